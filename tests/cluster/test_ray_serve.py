"""The examples for Ray Serve and Ray Data in a real Ray cluster of one host (a network namespace)."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from shoal import LLM, SamplingParams
from support import hosts
from support.host_programs import WAIT_S, Program, ask, exchange
from support.ray_cluster import ENVIRONMENT, RayNode

# `ray[serve]` needs watchfiles, `ray[data]` the two others.
MISSING = [name for name in ("ray", "watchfiles", "pandas", "pyarrow") if importlib.util.find_spec(name) is None]

pytestmark = [
    pytest.mark.slow,  # starts processes
    pytest.mark.skipif(bool(hosts.obstacle()), reason=hosts.obstacle()),
    pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} is not installed"),
    pytest.mark.timeout(300),
]

ROOT = Path(__file__).parent.parent.parent
SERVE_PORT = 8000  # Ray Serve's default
METRICS_PORT = 8080
ENGINE: dict[str, Any] = {"kv_cache_memory_bytes": "16MiB", "max_model_len": 128}
TOKENS = 16
PROMPTS = [f"{number} apples" for number in range(4)]
# Ray's agents report every second, and Serve's autoscaler decides by what it hears every second.
QUICK = {
    **ENVIRONMENT,
    "RAY_metrics_report_interval_ms": "1000",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
}
Start = Callable[..., Program]


@pytest.fixture(scope="module")
def host(two: tuple[hosts.Host, hosts.Host]) -> Iterator[hosts.Host]:
    """A host with a Ray cluster that counts more cores than it has."""
    flags = [f"--metrics-export-port={METRICS_PORT}"]
    node = RayNode(two[0], cpus=8, flags=flags, environment={**QUICK, "PYTHONPATH": str(ROOT)})
    try:
        yield two[0]
    finally:
        node.close()


@pytest.fixture(scope="module")
def expected() -> list[str]:
    """The texts after each prompt."""
    with LLM(**ENGINE) as llm:
        params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
        return [output.outputs[0].text for output in llm.generate(PROMPTS, params, use_tqdm=False)]


def complete(host: hosts.Host, prompt: str) -> str:
    parts = ask(host, prompt, 0, port=SERVE_PORT, temperature=0, max_tokens=TOKENS)
    assert len(parts) > 1  # it was streamed
    return "".join(parts)


def test_an_application_of_serve_scales_and_loses_no_request_with_its_ranks(
    start: Start, host: hosts.Host, expected: list[str]
) -> None:
    arguments = {"tensor_parallel_size": 2, "max_replicas": 2, "target_ongoing_requests": 1, "upscale_delay_s": 0.5}
    given = [f"{name}={value}" for name, value in arguments.items()]
    serve = start(
        host, "run", "examples.ray_serve.app:build", *given, f"engine={json.dumps(ENGINE)}",
        command=["env", "--default-signal=INT", str(Path(sys.executable).parent / "serve")],  # it may be ignored here
        environment={**QUICK, "RAY_ADDRESS": f"{host.address}:6379", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    serve.await_text("is ready at")
    assert '{"status":"ready"}' in exchange(host, SERVE_PORT, "GET", "/ready")
    (ranks,) = re.findall(r"node 1 \(\S+, process (\d+)\) has come from", serve.text)
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        assert list(pool.map(lambda prompt: complete(host, prompt), PROMPTS)) == expected
        streams = [pool.submit(complete, host, prompt) for prompt in PROMPTS]
        os.kill(int(ranks), signal.SIGKILL)
        assert [stream.result(WAIT_S) for stream in streams] == expected
        assert "is lost: node 1 " in serve.text
        deadline = time.monotonic() + WAIT_S
        while len(repliers(serve)) < 2:
            assert time.monotonic() < deadline, serve.text
            assert list(pool.map(lambda prompt: complete(host, prompt), PROMPTS)) == expected
    await_metric(host, r'ray_vllm_generation_tokens_total\{.*engine="0",model_name="bundled".*\} [1-9]')
    serve.process.send_signal(signal.SIGINT)
    serve.await_end()
    assert not engines(host)


def repliers(serve: Program) -> set[str]:
    """Return the replicas of the application that have answered requests."""
    return set(re.findall(r"default_shoal (\w+) \S+ -- POST / 200", serve.text))


def await_metric(host: hosts.Host, pattern: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not re.search(pattern, page := exchange(host, METRICS_PORT, "GET", "/metrics")):
        assert time.monotonic() < deadline, page
        threading.Event().wait(0.2)


def engines(host: hosts.Host) -> list[str]:
    """Return the commands of the processes of engines on a host."""
    pids = subprocess.run(["ip", "netns", "pids", host.netns], capture_output=True, text=True, check=True).stdout
    commands = []
    for pid in pids.split():
        try:
            commands.append(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " "))
        except OSError:  # it has ended meanwhile
            continue
    return [command for command in commands if "shoal." in command]


def test_a_job_of_ray_data_adds_the_texts(start: Start, host: hosts.Host, expected: list[str], tmp_path: Path) -> None:
    rows = [{"id": number, "prompt": prompt} for number, prompt in enumerate(PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = start(
        host, str(tmp_path / "prompts.jsonl"), str(tmp_path / "texts"),
        "--max-tokens", str(TOKENS), "--batch-size", "2",
        "--kv-cache-memory-bytes", "16MiB", "--max-model-len", "128", "--ignore-eos", "--tensor-parallel-size", "2",
        command=[sys.executable, str(ROOT / "examples" / "ray_data" / "generate.py")],
        environment={**QUICK, "RAY_ADDRESS": f"{host.address}:6379"},
    )  # fmt: skip
    assert job.await_end() == 0, job.text
    found = [json.loads(line) for file in (tmp_path / "texts").iterdir() for line in file.read_text().splitlines()]
    assert {row["id"]: (row["prompt"], row["text"]) for row in found} == dict(
        enumerate(zip(PROMPTS, expected, strict=True))
    )
