"""Versions, environment variables, the clock, and results of the all-reduce, with made-up facts."""

from typing import Any

import pytest

from shoal.doctor import all_reduce, clock, software
from shoal.doctor.all_reduce import AllReduceFacts, BackendResult
from shoal.doctor.clock import ClockFacts
from shoal.doctor.software import Software
from shoal.wire.doctor import Finding

TORCH: dict[str, Any] = {
    "version": "2.9.0",
    "cuda": "12.8",
    "rocm": "",
    "devices": ["H100"] * 2,
    "backends": ["gloo", "nccl"],
}
INSTALLED = Software((3, 12, 1), "2.9.0", torch_for_gpus=True)


def worst(findings: list[Finding]) -> dict[str, str]:
    order = ("ok", "warning", "failure")
    found: dict[str, str] = {}
    for each in findings:
        found[each.kind] = max(found.get(each.kind, "ok"), each.level, key=order.index)
    return found


def test_a_healthy_installation() -> None:
    found = worst(software.check(INSTALLED, TORCH, 2))
    assert found == dict.fromkeys(("python-version", "torch", "torch-devices", "variables"), "ok")


@pytest.mark.parametrize(
    ("installed", "torch", "gpus", "kind"),
    [
        (Software((3, 10, 4), "2.9.0"), TORCH, 0, "python-version"),
        (Software((3, 12, 1)), None, 0, "torch"),
        (Software((3, 12, 1), "2.9.0+cpu"), {**TORCH, "cuda": ""}, 2, "torch-build"),
        (INSTALLED, {**TORCH, "devices": []}, 2, "torch-devices"),
        (INSTALLED, {**TORCH, "backends": ["nccl"]}, 2, "torch"),
    ],
)
def test_broken_installations(installed: Software, torch: dict[str, Any] | None, gpus: int, kind: str) -> None:
    assert worst(software.check(installed, torch, gpus))[kind] == "failure"


def test_variables_that_slow_down_and_unknown_ones() -> None:
    found = software.check_variables({"NCCL_P2P_DISABLE": "1", "CUDA_LAUNCH_BLOCKING": "0"}, ["SHOAL_BLOK_SIZE"])
    assert [(each.level, each.mend) for each in found] == [
        ("warning", "unset NCCL_P2P_DISABLE"),
        ("warning", "unset SHOAL_BLOK_SIZE"),
    ]


@pytest.mark.parametrize(
    ("facts", "several", "level"),
    [
        (ClockFacts(1.8e9, True), True, "ok"),
        (ClockFacts(1.8e9, None), True, "ok"),
        (ClockFacts(1.8e9, False), True, "warning"),
        (ClockFacts(1.8e9, False), False, "ok"),
        (ClockFacts(0.0, True), False, "failure"),
    ],
)
def test_the_clock(facts: ClockFacts, several: bool, level: str) -> None:
    (finding,) = clock.check(facts, several_hosts=several)
    assert (finding.kind, finding.level) == ("clock", level)


def test_the_clock_of_this_host() -> None:
    assert clock.gather().now > 1.7e9


GOOD = BackendResult("gloo", 2, us=100, bytes_per_s=1e9)


def reduced(*results: BackendResult, error: str = "") -> AllReduceFacts:
    return AllReduceFacts(2, TORCH, list(results), error)


@pytest.mark.parametrize(
    ("result", "kind", "level", "words"),
    [
        (GOOD, "all-reduce", "ok", "gloo over 2 ranks: 100 us, 953.67 MiB/s (usual: "),
        (BackendResult("gloo", 2, right=False, us=1, bytes_per_s=1e9), "all-reduce", "failure", "the sums are wrong"),
        (BackendResult("nccl", 2, error="unhandled system error"), "all-reduce", "failure", "unhandled system error"),
        (BackendResult("nccl", 2, us=30, bytes_per_s=2e9, path="SHM"), "all-reduce-speed", "warning", "by SHM"),
        (BackendResult("gloo", 2, us=9000, bytes_per_s=1e9), "all-reduce-speed", "warning", "9000 us"),
    ],
)
def test_the_all_reduce(result: BackendResult, kind: str, level: str, words: str) -> None:
    found = {each.kind: each for each in all_reduce.check(reduced(result))}[kind]
    assert (found.level, words in found.text) == (level, True)


@pytest.mark.parametrize(
    ("error", "mend"),
    [
        ("unhandled system error (NCCL: Call to posix_fallocate failed : No space left on device)", "--shm-size"),
        ("Call to ibv_reg_mr failed", "memlock"),
        ("CUDA error: system not yet initialized", "nvidia-fabricmanager"),
        ("something else", "NCCL_P2P_DISABLE=1"),
    ],
)
def test_what_mends_an_error_of_the_all_reduce(error: str, mend: str) -> None:
    (finding,) = all_reduce.check(reduced(BackendResult("nccl", 2, error=error)))
    assert mend in finding.mend


def test_only_right_sums_are_measurements() -> None:
    wrong = BackendResult("nccl", 2, right=False, us=1, bytes_per_s=1e9)
    failed = BackendResult("threads", 2, error="failed")
    assert [each.backend for each in all_reduce.speeds(reduced(GOOD, wrong, failed))] == ["gloo"]


def test_ranks_that_end() -> None:
    assert worst(all_reduce.check(reduced(GOOD, error="rank 1 was killed by SIGKILL"))) == {"all-reduce": "failure"}
    assert worst(all_reduce.check(AllReduceFacts(2, error="rank 0 exited with code 1"))) == {"torch": "failure"}
