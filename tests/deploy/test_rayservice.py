"""The manifest for KubeRay: its pods are valid, and its parts fit together."""

import ast
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.kubernetes import check_pod

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def spec() -> Any:
    manifest = yaml.safe_load((ROOT / "deploy" / "kuberay" / "rayservice.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    return manifest["spec"]


def templates(spec: Any) -> list[Any]:
    cluster = spec["rayClusterConfig"]
    return [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]


def test_its_pods_are_valid(spec: Any) -> None:
    for template in templates(spec):
        check_pod(template)


def arguments_of_the_example() -> set[str]:
    (arguments,) = [
        node
        for node in ast.parse((ROOT / "examples" / "ray_serve" / "app.py").read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == "Arguments"
    ]
    return {
        each.target.id
        for each in arguments.body
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
    }


def test_the_application_is_the_example(spec: Any) -> None:
    (application,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    assert application["import_path"] == "examples.ray_serve.app:build"
    assert application["args"].keys() <= arguments_of_the_example()
    assert "COPY examples /srv/shoal/examples" in (ROOT / "deploy" / "Dockerfile").read_text()
    for template in templates(spec):
        variables = {each["name"]: each.get("value") for each in template["spec"]["containers"][0]["env"]}
        assert variables["PYTHONPATH"] == "/srv/shoal"


def test_every_pod_has_probes_that_need_no_program_of_the_image(spec: Any) -> None:
    for template in templates(spec):
        (container,) = template["spec"]["containers"]
        for probe in ("livenessProbe", "readinessProbe"):
            assert "httpGet" in container[probe]


def test_all_pods_run_the_same_image_as_its_user(spec: Any) -> None:
    found = templates(spec)
    assert len({template["spec"]["containers"][0]["image"] for template in found}) == 1
    assert {template["spec"]["securityContext"]["runAsUser"] for template in found} == {10001}


def test_strings_where_ray_wants_strings(spec: Any) -> None:
    cluster = spec["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
