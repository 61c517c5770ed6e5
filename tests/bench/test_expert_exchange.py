"""Ranks that measure the exchange of experts. A failure names the rank, and no process is left."""

import os
import signal
from collections.abc import Sequence
from typing import Any

import pytest

from shoal.bench import rank_processes
from shoal.bench.expert_exchange import ExpertTraffic, measure_experts
from shoal.errors import RankFailed
from shoal.transport.process import ChildProcess


@pytest.mark.slow
def test_a_rank_that_dies_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    children: list[ChildProcess] = []

    def start(
        module: str, arguments: Sequence[str], environment: dict[str, Any], passed: Sequence[int]
    ) -> ChildProcess:
        children.append(ChildProcess(module, arguments, environment, passed))
        if len(children) == 2:
            os.kill(children[0].pid, signal.SIGKILL)
        return children[-1]

    monkeypatch.setattr(rank_processes, "ChildProcess", start)
    traffic = ExpertTraffic(2, experts=4, top_k=1, hidden_size=8, dtype="float32", tokens=(1,), repeat=1)
    with pytest.raises(RankFailed, match=r"rank 0 \(process \d+\) was killed by SIGKILL"):
        measure_experts(traffic)
    assert all(child.wait(0) for child in children)
