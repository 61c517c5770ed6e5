"""The Helm chart, rendered by Helm's library with many values, and checked against the schemas of Kubernetes."""

import importlib.util
import os
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from support import helm
from support.helm import Rendered
from support.kubernetes import check, check_pod, expand, selects
from support.serve_flags import unknown_flags

pytestmark = [
    pytest.mark.slow,  # starts a process
    pytest.mark.skipif(not importlib.util.find_spec("helm_python"), reason="needs helm-python-sdk"),
]

ROOT = Path(__file__).parent.parent.parent
CHART = ROOT / "deploy" / "chart"
KEY = {"existingSecret": "cluster", "key": "cluster-key"}
VALUES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "everything": {
        "model": "Qwen/Qwen3-0.6B",
        "servedModelName": "qwen",
        "layout": {"tensorParallel": 2, "pipelineParallel": 3, "dataParallel": 2, "expertParallel": True},
        "replicas": 3,
        "gpu": {"enabled": True},
        "resources": {"requests": {"cpu": "8"}, "limits": {"memory": "64Gi"}},
        "extraArgs": ["--max-model-len", "8192"],
        "env": [{"name": "NCCL_DEBUG", "value": "INFO"}],
        "pullSecrets": [{"name": "registry"}],
        "apiKey": {"existingSecret": "api"},
        "hfToken": {"existingSecret": "hub"},
        "cache": {"create": True, "storageClassName": "nfs"},
        "service": {"type": "LoadBalancer", "annotations": {"a": "b"}},
        "shutdownTimeout": 300,
        "autoscaling": {"enabled": True, "maxReplicas": 8},
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "runtimeClassName": "nvidia",
        "priorityClassName": "high",
        "serviceAccountName": "shoal",
        "podAnnotations": {"a": "b"},
        "podLabels": {"team": "search"},
        "nodeSelector": {"gpu": "yes"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "affinity": {"podAntiAffinity": {}},
        "topologySpreadConstraints": [
            {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway"}
        ],
    },
    "one replica over hosts": {
        "hosts": 2,
        "layout": {"tensorParallel": 4, "pipelineParallel": 2},
        "gpu": {"enabled": True},
        "clusterKey": {"value": "a secret"},
        "apiKey": {"existingSecret": "api"},
        "autoscaling": {"enabled": True},
    },
    "replicas over hosts": {"hosts": 3, "layout": {"dataParallel": 6}, "clusterKey": KEY, "replicas": 2},
    "no budget": {"podDisruptionBudget": {"enabled": False}, "probes": {"readinessPath": "/health"}},
    "no key": {"hosts": 2, "layout": {"pipelineParallel": 2}},
    "uneven ranks": {"hosts": 2, "layout": {"tensorParallel": 3}, "clusterKey": KEY},
    "uneven replicas": {"hosts": 2, "layout": {"tensorParallel": 2, "dataParallel": 3}, "clusterKey": KEY},
    "unknown name": {"replicaCount": 2},
    "wrong type": {"layout": {"tensorParallel": "two"}},
}
GOOD = ["defaults", "everything", "one replica over hosts", "replicas over hosts", "no budget"]
OVER_HOSTS = ["one replica over hosts", "replicas over hosts"]

# What the chart uses of kinds that are not part of Kubernetes, as their projects define it. Pods are checked apart.
COUNT = {"type": "integer", "minimum": 0}
LEADER_WORKER_SET = {
    "type": "object",
    "additionalProperties": False,
    "required": ["leaderWorkerTemplate"],
    "properties": {
        "replicas": COUNT,
        "startupPolicy": {"enum": ["LeaderCreated", "LeaderReady"]},
        "leaderWorkerTemplate": {
            "type": "object",
            "additionalProperties": False,
            "required": ["workerTemplate"],
            "properties": {
                "size": {"type": "integer", "minimum": 1},
                "restartPolicy": {"enum": ["RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"]},
                "leaderTemplate": {"type": "object"},
                "workerTemplate": {"type": "object"},
            },
        },
    },
}
SERVICE_MONITOR = {
    "type": "object",
    "additionalProperties": False,
    "required": ["selector", "endpoints"],
    "properties": {
        "selector": {"type": "object"},
        "endpoints": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "properties": {"port": {"type": "string"}, "path": {"type": "string"}, "interval": {"type": "string"}},
            },
        },
    },
}
CUSTOM = {"LeaderWorkerSet": LEADER_WORKER_SET, "ServiceMonitor": SERVICE_MONITOR}


@pytest.fixture(scope="module")
def charts() -> dict[str, Rendered]:
    return dict(zip(VALUES, helm.render(CHART, list(VALUES.values())), strict=True))


def pods(chart: Rendered) -> list[Any]:
    """Return the pod templates of a chart, that of servers first."""
    if "Deployment" in chart.kinds:
        return [chart.one("Deployment")["spec"]["template"]]
    template = chart.one("LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]
    return [template["leaderTemplate"], template["workerTemplate"]]


def container(pod: Any) -> Any:
    (found,) = pod["spec"]["containers"]
    return found


def flag(pod: Any, name: str) -> str:
    words: list[str] = container(pod)["args"]
    return words[words.index(name) + 1]


@pytest.mark.parametrize("case", GOOD)
def test_helm_renders_the_chart_without_a_complaint(charts: dict[str, Rendered], case: str) -> None:
    assert (charts[case].error, charts[case].complaints) == ("", [])


@pytest.mark.parametrize("case", GOOD)
def test_manifests_are_valid(charts: dict[str, Rendered], case: str) -> None:
    for manifest in charts[case].manifests:
        if manifest["kind"] in CUSTOM:
            jsonschema.validate(manifest["spec"], CUSTOM[manifest["kind"]])
        else:
            check(manifest)
    for pod in pods(charts[case]):
        check_pod(pod)


@pytest.mark.parametrize("case", GOOD)
def test_shoal_knows_the_flags(charts: dict[str, Rendered], case: str) -> None:
    for pod in pods(charts[case]):
        words = container(pod)["args"]
        assert words[:2] == ["serve", VALUES[case].get("model", "bundled")]
        assert unknown_flags(words[2:]) == set()


@pytest.mark.parametrize("case", GOOD)
def test_selectors_find_the_servers_and_no_workers(charts: dict[str, Rendered], case: str) -> None:
    chart = charts[case]
    selectors = [chart.one("Service")["spec"]["selector"]]
    if "PodDisruptionBudget" in chart.kinds:
        selectors.append(chart.one("PodDisruptionBudget")["spec"]["selector"]["matchLabels"])
    if "Deployment" in chart.kinds:
        selectors.append(chart.one("Deployment")["spec"]["selector"]["matchLabels"])
    server, *workers = pods(chart)
    for selector in selectors:
        assert selects(selector, server)
        assert not any(selects(selector, worker) for worker in workers)


def test_the_monitor_finds_the_service(charts: dict[str, Rendered]) -> None:
    monitor, service = charts["everything"].one("ServiceMonitor"), charts["everything"].one("Service")
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    assert selects(monitor["spec"]["selector"]["matchLabels"], service)
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["path"] == "/metrics"
    assert endpoint["port"] in [port["name"] for port in service["spec"]["ports"]]


@pytest.mark.parametrize("case", GOOD)
def test_a_pod_is_killed_only_after_its_drain(charts: dict[str, Rendered], case: str) -> None:
    server, *workers = pods(charts[case])
    waits = [int(container(pod)["lifecycle"]["preStop"]["exec"]["command"][1]) for pod in (server, *workers)]
    drain = int(flag(server, "--shutdown-timeout"))
    assert server["spec"]["terminationGracePeriodSeconds"] >= waits[0] + drain + 15
    for worker, wait in zip(workers, waits[1:], strict=True):
        assert wait >= waits[0] + drain, "a worker computes for its leader until that has drained"
        assert worker["spec"]["terminationGracePeriodSeconds"] > wait


@pytest.mark.parametrize(
    ("case", "path"), [("defaults", "/ready"), ("everything", "/health"), ("no budget", "/health")]
)
def test_probes_ask_health_and_ready(charts: dict[str, Rendered], case: str, path: str) -> None:
    found = container(pods(charts[case])[0])
    assert found["startupProbe"]["httpGet"] == {"path": "/health", "port": "http"}
    assert found["livenessProbe"]["httpGet"] == {"path": "/health", "port": "http"}
    assert found["readinessProbe"]["httpGet"] == {"path": path, "port": "http"}
    assert found["startupProbe"]["periodSeconds"] * found["startupProbe"]["failureThreshold"] == 1800


@pytest.mark.parametrize("case", OVER_HOSTS)
def test_a_headless_pod_has_no_probe_of_http(charts: dict[str, Rendered], case: str) -> None:
    worker = container(pods(charts[case])[1])
    assert "--headless" in worker["args"]
    assert not {"startupProbe", "livenessProbe", "readinessProbe", "ports"} & worker.keys()


@pytest.mark.parametrize(("case", "gpus"), [("defaults", None), ("everything", 12), ("one replica over hosts", 4)])
def test_a_pod_has_a_gpu_for_each_of_its_ranks(charts: dict[str, Rendered], case: str, gpus: int | None) -> None:
    for pod in pods(charts[case]):
        resources = container(pod)["resources"]
        assert resources.get("limits", {}).get("nvidia.com/gpu") == gpus
        assert "nvidia.com/gpu" not in resources["requests"], "Kubernetes takes the limit"
    if case == "everything":
        assert resources["limits"]["memory"] == "64Gi"


@pytest.mark.parametrize("case", GOOD)
def test_pods_have_no_rights_and_no_variables_of_services(charts: dict[str, Rendered], case: str) -> None:
    for pod in pods(charts[case]):
        assert pod["spec"]["enableServiceLinks"] is False
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert container(pod)["securityContext"]["readOnlyRootFilesystem"] is True


def test_the_user_is_that_of_the_image(charts: dict[str, Rendered]) -> None:
    security = pods(charts["defaults"])[0]["spec"]["securityContext"]
    assert f"USER {security['runAsUser']}\n" in (ROOT / "deploy" / "Dockerfile").read_text()


def test_the_autoscaler_sets_the_number_of_pods(charts: dict[str, Rendered]) -> None:
    for case, kind in (("everything", "Deployment"), ("one replica over hosts", "LeaderWorkerSet")):
        scaler, target = charts[case].one("HorizontalPodAutoscaler"), charts[case].one(kind)
        assert scaler["spec"]["scaleTargetRef"] == {
            "apiVersion": target["apiVersion"],
            "kind": kind,
            "name": target["metadata"]["name"],
        }
        assert "replicas" not in target["spec"]
    assert charts["replicas over hosts"].one("LeaderWorkerSet")["spec"]["replicas"] == 2


def test_the_adapter_of_prometheus_has_the_metric_of_the_autoscaler(charts: dict[str, Rendered]) -> None:
    adapter = yaml.safe_load((ROOT / "deploy" / "kubernetes" / "prometheus-adapter.yaml").read_text())
    (rule,) = adapter["rules"]["custom"]
    (metric,) = charts["everything"].one("HorizontalPodAutoscaler")["spec"]["metrics"]
    assert rule["name"]["as"] == metric["pods"]["metric"]["name"]
    assert '__name__="vllm:num_requests_waiting"' in rule["seriesQuery"]


def started(pod: Any, folder: Path, index: int, size: int) -> str:
    """Return what a pod of a group calls `shoal` with, by a fake of it."""
    variables = {"LWS_LEADER_ADDRESS": "llm-0.llm", "LWS_GROUP_SIZE": str(size), "LWS_WORKER_INDEX": str(index)}
    for name, does in (("shoal", 'echo "$*"'), ("tini", 'shift; exec "$@"')):
        (folder / name).write_text(f"#!/bin/sh\n{does}\n")
        (folder / name).chmod(0o755)
    link = folder / "shoal-entrypoint"
    link.unlink(missing_ok=True)
    link.symlink_to(ROOT / "deploy" / "image" / "entrypoint")
    found = container(pod)
    words = [*found.get("command", ["tini", "--", "shoal-entrypoint"]), *found["args"]]
    done = subprocess.run(
        [expand(word, variables) for word in words],
        env={**os.environ, **variables, "PATH": f"{folder}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return done.stdout.strip()


def test_the_pods_of_one_replica_know_their_place(charts: dict[str, Rendered], tmp_path: Path) -> None:
    leader, worker = pods(charts["one replica over hosts"])
    place = "--tensor-parallel-size 4 --pipeline-parallel-size 2 --data-parallel-size 1 --nnodes 2 --node-rank {}"
    place += " --master-addr llm-0.llm"
    assert started(leader, tmp_path, 0, 2).endswith(place.format(0))
    assert started(worker, tmp_path, 1, 2).endswith(place.format(1) + " --headless")


def test_the_pods_of_several_replicas_know_their_first_one(charts: dict[str, Rendered], tmp_path: Path) -> None:
    leader, worker = pods(charts["replicas over hosts"])
    place = " --data-parallel-size 6 --data-parallel-size-local 2 --data-parallel-address llm-0.llm"
    place += " --data-parallel-rpc-port 29550"
    assert started(leader, tmp_path, 0, 3).endswith(place)
    for index in (1, 2):
        ending = f"{place} --headless --data-parallel-start-rank {2 * index}"
        assert started(worker, tmp_path, index, 3).endswith(ending)


def test_a_host_of_one_replica_takes_the_others_along(charts: dict[str, Rendered]) -> None:
    def policy(case: str) -> str:
        return str(charts[case].one("LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]["restartPolicy"])

    assert policy("one replica over hosts") == "RecreateGroupOnPodRestart"
    assert policy("replicas over hosts") == "None"


def test_secrets_are_read_from_secrets(charts: dict[str, Rendered]) -> None:
    def names(pod: Any) -> dict[str, str]:
        env = container(pod)["env"]
        return {each["name"]: each["valueFrom"]["secretKeyRef"]["name"] for each in env if "valueFrom" in each}

    assert names(pods(charts["everything"])[0]) == {"SHOAL_API_KEY": "api", "HF_TOKEN": "hub"}
    leader, worker = pods(charts["one replica over hosts"])
    made = charts["one replica over hosts"].one("Secret")
    assert made["stringData"] == {"cluster-key": "a secret"}
    assert names(leader) == {"SHOAL_API_KEY": "api", "SHOAL_CLUSTER_KEY": made["metadata"]["name"]}
    assert names(worker) == {"SHOAL_CLUSTER_KEY": made["metadata"]["name"]}
    assert names(pods(charts["replicas over hosts"])[0]) == {"SHOAL_CLUSTER_KEY": "cluster"}
    assert "Secret" not in charts["replicas over hosts"].kinds


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no key", "several hosts need a shared secret: set clusterKey.existingSecret"),
        ("uneven ranks", "the layout has 3 ranks, which 2 hosts cannot share equally"),
        ("uneven replicas", "3 replicas cannot be shared out equally over 2 hosts"),
        ("unknown name", "additional properties 'replicaCount' not allowed"),
        ("wrong type", "at '/layout/tensorParallel': got string, want integer"),
    ],
)
def test_values_that_cannot_work_are_refused(charts: dict[str, Rendered], case: str, message: str) -> None:
    assert message in charts[case].error


def test_every_value_is_in_the_schema_and_the_reverse() -> None:
    def compare(values: Any, schema: Any, place: str) -> None:
        if not schema.get("properties"):
            return
        named = schema["properties"].keys() - {"global"}
        assert values.keys() == named, place
        for name in named:
            compare(values[name], schema["properties"][name], f"{place}.{name}")

    schema = yaml.safe_load((CHART / "values.schema.json").read_text())
    compare(yaml.safe_load((CHART / "values.yaml").read_text()), schema, "")


def test_the_notes_say_what_runs_and_what_is_open(charts: dict[str, Rendered]) -> None:
    assert "group(s) of 3 pods, with 2 rank(s) in each pod" in charts["replicas over hosts"].notes
    assert "There is no API key" in charts["defaults"].notes
    assert "There is no API key" not in charts["everything"].notes
    assert f"service/{charts['defaults'].one('Service')['metadata']['name']} 8000:80" in charts["defaults"].notes
