"""Ranks and replicas in a real Ray cluster of two hosts (network namespaces)."""

import importlib.util
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shoal import LLM, SamplingParams
from shoal.wire.topology import read_topology
from support import hosts
from support.certificates import Cluster
from support.checkpoints import Reference
from support.host_programs import NUM_TOKENS, PORT, PROMPT, SMALL, WAIT_S, Program, ask, generation
from support.ray_cluster import ENVIRONMENT, RayNode, ray_cluster

pytestmark = [
    pytest.mark.slow,  # starts processes
    pytest.mark.skipif(bool(hosts.obstacle()), reason=hosts.obstacle()),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
    pytest.mark.timeout(300),
]

Two = tuple[hosts.Host, hosts.Host]
Start = Callable[..., Program]


PARTS = '{"GPU": 0.6, "slot": 0.5}'
RESOURCES = ["--num-gpus=1", '--resources={"slot": 1}']  # Ray counts them, whether there are GPUs or not
ON_CPUS = ["--device", "cpu"]
STREAMS = 6


@pytest.fixture(scope="module")
def cluster(two: Two) -> Iterator[tuple[RayNode, RayNode]]:
    with ray_cluster(two, flags=RESOURCES) as nodes:
        yield nodes


def generate(start: Start, node: RayNode, folder: Path, *flags: str) -> tuple[list[int], Program]:
    output = folder / "answers.jsonl"
    output.unlink(missing_ok=True)
    command = [*generation(folder), "--output", str(output), "--dtype", "float32", "--ray-address", node.address]
    program = start(node.host, *command, *ON_CPUS, *flags, environment=ENVIRONMENT)
    assert program.await_end() == 0, program.text
    (line,) = output.read_text().splitlines()
    return json.loads(line)["outputs"][0]["token_ids"], program


@pytest.mark.parametrize(
    ("flags", "sizes", "encrypted"),
    [
        (["-tp", "3", "--distributed-executor-backend", "ray"], "2 + 1", True),
        (["-pp", "2", "--distributed-executor-backend", "ray", "--ray-resources", PARTS], "1 + 1", False),
    ],
    ids=["tp 3 across, TLS", "parts of GPUs"],
)
def test_a_replica_over_a_ray_cluster_gives_the_tokens_of_transformers(
    start: Start,
    two: Two,
    cluster: tuple[RayNode, RayNode],
    checkpoint: Callable[[str], Path],
    flags: list[str],
    sizes: str,
    encrypted: bool,
    tmp_path: Path,
) -> None:
    folder = checkpoint("llama")
    if encrypted:
        flags = [*flags, "--cluster-tls", str(Cluster(tmp_path).folder())]
    before = hosts.sent_bytes(two[0])
    tokens, program = generate(start, cluster[0], folder, *flags)
    assert tokens == Reference(folder).greedy(PROMPT, NUM_TOKENS)[0]
    assert f"2 bundles of {sizes} ranks" in program.text
    assert ("connections between hosts use TLS" in program.text) == encrypted
    addresses = set(re.findall(r"has come from (\S+)", program.text))
    assert addresses == {host.address for host in two}
    assert hosts.sent_bytes(two[0]) > before


def test_the_doctor_examines_every_node_of_a_cluster(
    start: Start, two: Two, cluster: tuple[RayNode, RayNode], tmp_path: Path
) -> None:
    file = tmp_path / "topology.json"
    flags = ["--ray", "--ray-address", cluster[0].address, "--ranks", "0", "--json", "--output", str(file)]
    doctor = start(two[0], "doctor", *flags, environment={**ENVIRONMENT, "SHOAL_LOG_LEVEL": "error"})
    assert doctor.await_end() == 1, doctor.text  # one failure: Ray counts GPUs that the hosts do not have
    findings = json.loads(doctor.text[doctor.text.index("{\n") :])["findings"]
    of_all = {each["kind"]: each for each in findings if each["host"] == "all hosts"}
    for kind in ("hosts", "versions", "all-reduce", "connection"):
        assert of_all[kind]["level"] == "ok", of_all[kind]
    of_ray = {each["kind"]: each for each in findings if each["host"] == "Ray cluster"}
    assert of_ray["ray-nodes"]["level"] == of_ray["ray-address"]["level"] == "ok"
    failures = [each["text"] for each in findings if each["level"] == "failure"]
    name = os.uname().nodename
    assert failures == [f"Ray counts 1 GPU on {name} ({host.address}), which has 0" for host in two]
    topology = read_topology(file.read_bytes())
    assert [host.address for host in topology.hosts] == [host.address for host in two]
    assert {(each.source, each.target) for each in topology.pairs if each.bandwidth} == {(0, 1), (1, 0)}


def serve(start: Start, node: RayNode, *flags: str) -> Program:
    server = start(
        node.host, "serve", "bundled", *SMALL, *ON_CPUS, "--port", str(PORT), "--ray-address", node.address, *flags,
        environment=ENVIRONMENT,
    )  # fmt: skip
    server.await_text("Shoal serves")
    return server


def texts_of_one_rank() -> list[str]:
    """Return what an engine in this process draws for the streams."""
    params = [SamplingParams(seed=seed, max_tokens=48, ignore_eos=True) for seed in range(STREAMS)]
    with LLM(kv_cache_memory_bytes="16MiB", max_model_len=128) as llm:
        outputs = llm.generate([f"{seed} apples" for seed in range(STREAMS)], params, use_tqdm=False)
    return [output.outputs[0].text for output in outputs]


def test_no_request_is_lost_when_a_host_of_the_cluster_ends_under_load(
    start: Start, two: Two, cluster: tuple[RayNode, RayNode], checkpoint: Callable[[str], Path]
) -> None:
    """Meanwhile the server holds all resources, so another program that asks for some is told by whom."""
    server = serve(start, cluster[0], "-tp", "2", "-pp", "2")  # Ray is chosen, because one host has two cores
    assert "2 bundles of 2 + 2 ranks" in server.text
    assert set(re.findall(r"has come from (\S+)", server.text)) == {host.address for host in two}
    command = [*generation(checkpoint("llama")), "--output", "-", "-tp", "2", "--start-timeout", "12", *ON_CPUS]
    late = start(
        cluster[0].host, *command, "--ray-address", cluster[0].address, "--distributed-executor-backend", "ray",
        environment=ENVIRONMENT,
    )  # fmt: skip
    with ThreadPoolExecutor(STREAMS) as pool:
        expected = list(pool.map(lambda seed: "".join(ask(two[0], f"{seed} apples", seed)), range(STREAMS)))
        assert expected == texts_of_one_rank()
        error = error_of(late)
        assert "Ray has not placed the ranks within 12 s: it asks for 2 CPU; " in error
        assert "10.213.77.1 has 0 CPU free of 2 CPU" in error
        assert "held by shoal-replica-0 has 4 CPU" in error

        streams = [pool.submit(ask, two[0], f"{seed} apples", seed) for seed in range(STREAMS)]
        cluster[1].kill()
        server.await_text("is lost: node ", "was killed by SIGKILL")
        cluster[1].start()
        assert ["".join(stream.result(WAIT_S)) for stream in streams] == expected
    server.process.send_signal(signal.SIGTERM)
    assert server.await_end() == 0, server.text


def test_replicas_over_the_cluster_are_added_removed_and_restarted(
    start: Start, two: Two, cluster: tuple[RayNode, RayNode]
) -> None:
    server = serve(start, cluster[0], "--data-parallel-backend", "ray", "-dp", "2")
    with ThreadPoolExecutor(STREAMS) as pool:
        expected = list(pool.map(lambda seed: "".join(ask(two[0], f"{seed} apples", seed)), range(STREAMS)))
        assert scale(start, two[0], 3) == 0
        server.await_text("replica 2 is ready")
        assert scale(start, two[0], 1) == 0
        (actor,) = re.findall(r"node 1 \(\S+, process (\d+)\) has come from", server.text)
        streams = [pool.submit(ask, two[0], f"{seed} apples", seed) for seed in range(STREAMS)]
        os.kill(int(actor), signal.SIGKILL)
        assert ["".join(stream.result(WAIT_S)) for stream in streams] == expected
    server.process.send_signal(signal.SIGTERM)
    assert server.await_end() == 0, server.text


def scale(start: Start, host: hosts.Host, count: int) -> int:
    return start(host, "scale", f"http://127.0.0.1:{PORT}", str(count)).await_end()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["-tp", "5", "--distributed-executor-backend", "ray"], "5 ranks need 5 CPU in bundles of 2 + 2 + 1 ranks"),
        (
            ["--distributed-executor-backend", "ray", "--ray-resources", '{"TPU": 1}'],
            "no node of the Ray cluster has 1 TPU for a rank",
        ),
        (
            ["--distributed-executor-backend", "ray", "--ray-address", "10.213.77.1:6380"],
            "no answer (Connection refused)",
        ),
        (["--distributed-executor-backend", "ray", "--nnodes", "2", "-tp", "2"], "Ray places ranks itself"),
    ],
    ids=["too small", "unknown resource", "no cluster", "nodes by hand"],
)
def test_what_ray_cannot_do_is_one_clear_line(
    start: Start, cluster: tuple[RayNode, RayNode], checkpoint: Callable[[str], Path], flags: list[str], told: str
) -> None:
    command = [*generation(checkpoint("llama")), "--output", "-", "--ray-address", cluster[0].address, *ON_CPUS, *flags]
    program = start(cluster[0].host, *command, environment=ENVIRONMENT)
    assert told in error_of(program)


def error_of(program: Program) -> str:
    """Wait until a program has ended with an error of the user, and return its one line."""
    assert program.await_end() == 2, program.text
    (line,) = [line for line in program.text.splitlines() if line.startswith("error: ")]
    return line


def test_a_process_with_another_version_of_ray_than_the_cluster(
    start: Start, cluster: tuple[RayNode, RayNode], checkpoint: Callable[[str], Path]
) -> None:
    pretend = "import ray; ray.__version__ = '2.0.0'; from shoal.cli.main import main; main()"
    flags = ["--output", "-", "--ray-address", cluster[0].address, "--distributed-executor-backend", "ray"]
    program = start(
        cluster[0].host, *generation(checkpoint("llama")), *flags,
        command=(sys.executable, "-c", pretend), environment=ENVIRONMENT,
    )  # fmt: skip
    error = error_of(program)
    assert re.search(
        r"cluster was started with: Ray: \S+ Python: \S+ This process .* was started with: Ray: 2.0.0 ", error
    )
    assert error.endswith("; install the same versions of Ray and Python on all hosts")
