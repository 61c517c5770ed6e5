"""Measuring how tokens are sent to experts on other ranks and back. Ranks are processes of this host."""

import json
import os
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from shoal.devices import cpu
from shoal.errors import ConfigError, EngineError, RankFailed
from shoal.planner.all2all import choose_all2all
from shoal.transport.channel import ChannelClosed, wait
from shoal.transport.process import ChildProcess, end_all

_SILENCE_LIMIT_S = 180.0  # the measurement fails if no rank answers for so long


@dataclass(frozen=True, slots=True)
class ExpertTraffic:
    """Sizes of an exchange between `ranks` replicas of one rank each, which share the experts of a layer.

    `tokens`: the numbers of tokens on each rank, which are measured one after the other.

    Raises:
        ConfigError: `top_k` is more than `experts`.
    """

    ranks: int
    experts: int
    top_k: int
    hidden_size: int
    dtype: str
    tokens: tuple[int, ...]
    repeat: int

    def __post_init__(self) -> None:
        if self.top_k > self.experts:
            raise ConfigError(
                f"--top-k {self.top_k} is more than --experts {self.experts}: lower --top-k or raise --experts"
            )

    def choose(self) -> tuple[str, str]:
        """Return the backend that `--all2all-backend auto` chooses, and the reason."""
        sizes = {"experts": self.experts, "top_k": self.top_k, "hidden_size": self.hidden_size}
        return choose_all2all(**sizes, dtype=self.dtype, ranks=self.ranks)


def measure_experts(traffic: ExpertTraffic) -> list[dict[str, Any]]:
    """Measure a layer's dispatch and combine for each number of tokens and each backend.

    The results have `us` (microseconds, the median of the slowest rank) and `sent_bytes` (bytes that a rank sends, the
    mean over ranks).

    Raises:
        RankFailed: a rank died or stands still.
        EngineError: the ranks could not reach each other.
    """
    store, cores = os.memfd_create("shoal-store"), cpu.discover().cores
    question = json.dumps(asdict(traffic))
    children: list[ChildProcess] = []
    try:
        for rank in range(traffic.ranks):
            pinning = cpu.pinning_environment(cpu.cores_of_rank(cores, rank, traffic.ranks)[:1])
            arguments = ["--rank", str(rank), "--store", str(store), "--question", question]
            children.append(ChildProcess("shoal.worker.expert_exchange", arguments, pinning, [store]))
        return _summary(_collect(children))
    finally:
        end_all(children, None, 0)
        os.close(store)


def _collect(children: Sequence[ChildProcess]) -> list[dict[str, Any]]:
    """Return the answers of all ranks."""
    answers: list[dict[str, Any]] = []
    awaited = dict(enumerate(children))
    while awaited:
        readable = wait([child.channel for child in awaited.values()], _SILENCE_LIMIT_S)
        if not readable:
            silent = ", ".join(f"rank {rank} (process {child.pid})" for rank, child in awaited.items())
            raise RankFailed(f"{silent} sent nothing for {_SILENCE_LIMIT_S:g} s")
        for rank, child in tuple(awaited.items()):
            found = _receive(rank, child) if child.channel in readable else []
            if {"done": True} in found:
                del awaited[rank]
            answers += [answer for answer in found if answer != {"done": True}]
    return answers


def _receive(rank: int, child: ChildProcess) -> list[dict[str, Any]]:
    try:
        found = [json.loads(frame) for frame in child.channel.receive()]
    except ChannelClosed:
        raise RankFailed(f"rank {rank} (process {child.pid}) {child.describe_exit()}") from None
    for answer in found:
        if "error" in answer:
            raise EngineError(answer["error"])
    return found


def _summary(answers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    groups: dict[tuple[int, str], list[Mapping[str, Any]]] = defaultdict(list)
    for answer in answers:
        groups[answer["tokens"], answer["backend"]].append(answer)
    return [
        {
            "tokens": tokens,
            "backend": backend,
            "us": max(answer["us"] for answer in group),
            "sent_bytes": statistics.mean(answer["sent_bytes"] for answer in group),
        }
        for (tokens, backend), group in groups.items()
    ]
