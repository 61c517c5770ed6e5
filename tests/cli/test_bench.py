"""`shoal bench` runs, and its figures are consistent."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # starts processes

SMALL = ["shape:llama-10m", "--kv-cache-memory-bytes", "32MiB", "--repeat", "1"]


Bench = Callable[..., dict[str, Any]]


@pytest.fixture
def bench(shoal: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> Bench:
    """Return a function that runs `shoal bench` in this process and returns its report."""

    def run(*arguments: str) -> dict[str, Any]:
        capsys.readouterr()
        assert shoal("bench", *arguments) == 0
        report: dict[str, Any] = json.loads(capsys.readouterr().out)
        return report

    return run


def test_latency(bench: Bench) -> None:
    lengths = ["--input-len", "20", "--output-len", "6"]
    report = bench("latency", *SMALL, *lengths, "--batch-size", "1", "--batch-size", "3")
    assert [result["batch_size"] for result in report["results"]] == [1, 3]
    for result in report["results"]:
        assert result["steps"] == 6  # one for all prompts, one for each further token
        assert 0 < result["time_to_first_token_s"] < result["seconds"]
        assert 0 < result["schedule_us_per_step"] < result["control_us_per_step"]
        assert result["output_tokens_per_s"] > 0
    assert report["options"]["max_model_len"] == 26
    assert "communication" not in report["results"][0]
    assert {"launch", "connect", "load", "profile", "allocate", "warm_up"} == set(report["start_s"])
    assert report["ranks"][0]["weight_bytes"] > 2**20


def test_throughput_into_a_file(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    command = ["throughput", *SMALL, "--input-len", "8", "--output-len", "3", "--num-prompts", "5"]
    command += ["-tp", "2", "--distributed-executor-backend", "threads", "--profile-comm"]
    done = subprocess.run(
        [sys.executable, "-m", "shoal", "bench", *command, "--output", str(file)], timeout=100, check=True
    )
    assert done.returncode == 0
    (result,) = json.loads(file.read_text())["results"]
    assert result["batch_size"] == 5
    reduces = next(each for each in result["communication"]["operations"] if each["operation"] == "all_reduce")
    assert reduces["calls"] % result["steps"] == 0  # the same in each step of the one run
    assert 0 < reduces["share"] < 1


def test_latency_with_replicas(bench: Bench) -> None:
    lengths = ["--input-len", "8", "--output-len", "3", "--num-prompts", "6"]
    report = bench("throughput", *SMALL, *lengths, "-dp", "2", "--distributed-executor-backend", "threads")
    assert [rank["rank"] for rank in report["ranks"]] == [0, 1]
    (result,) = report["results"]
    assert result["steps"] >= 2 * 3
    assert 0 <= result["stage_idle"][0] < 1
    assert len(result["stage_idle"]) == 1


def test_startup(bench: Bench) -> None:
    report = bench("startup", *SMALL)
    phases = report["seconds"]
    assert phases["ready"] > sum(seconds for name, seconds in phases.items() if name != "ready") > 0


def test_comm(bench: Bench) -> None:
    sizes = ["--size", "2KiB", "--size", "300KiB", "--operation", "all_reduce", "--operation", "barrier"]
    report = bench("comm", "--json", "--ranks", "2", "--repeat", "3", *sizes)
    assert (report["pattern"], report["sizes"], report["dtype"]) == ("operations", [2048, 307200], "bfloat16")
    cells = [("all_reduce", 2048), ("all_reduce", 307200), ("barrier", 0)]
    found = {(result["operation"], result["bytes"], result["backend"]): result for result in report["results"]}
    assert set(found) == {(*cell, backend) for cell in cells for backend in ("shm", "gloo")}
    assert all(result["us"] > 0 for result in found.values())
    assert found["all_reduce", 2048, "shm"]["bus_bytes_per_s"] > 0


def test_flags_of_another_pattern_are_refused(shoal: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert shoal("bench", "comm", "--tokens", 4) == 2
    assert capsys.readouterr().err == "error: --tokens is for --pattern moe, and the pattern is operations\n"
    assert shoal("bench", "comm", "--pattern", "moe", "--size", "1KiB") == 2
    assert capsys.readouterr().err == "error: --size is for --pattern operations, and the pattern is moe\n"


def test_comm_with_experts(shoal: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    sizes = ["--ranks", "2", "--experts", "4", "--top-k", "1", "--hidden-size", "16", "--dtype", "float32"]
    command = ["comm", "--pattern", "moe", *sizes, "--tokens", "0", "--tokens", "300", "--repeat", "3"]
    assert shoal("bench", *command, "-o", file) == 0
    report = json.loads(file.read_text())
    assert capsys.readouterr().out.splitlines()[-1] == f"auto chooses {report['auto']}: {report['why']}"
    assert report["auto"] == "all_to_all"
    assert report["tokens"] == [0, 300]
    sent = {(result["tokens"], result["backend"]): result["sent_bytes"] for result in report["results"]}
    row, routing, counts = 16 * 4, 8, 8
    assert sent[0, "allgather_reducescatter"] == 0
    assert sent[0, "all_to_all"] == counts
    assert sent[300, "allgather_reducescatter"] == 300 * (2 * row + routing)
    assert 0.4 < (sent[300, "all_to_all"] - counts) / sent[300, "allgather_reducescatter"] < 0.6  # its one expert
    assert all(result["us"] > 0 for result in report["results"])


def test_comm_counts_experts(shoal: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert shoal("bench", "comm", "--pattern", "moe", "--experts", 4, "--top-k", 8) == 2
    assert capsys.readouterr().err == "error: --top-k 8 is more than --experts 4: lower --top-k or raise --experts\n"
