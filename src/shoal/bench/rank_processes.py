"""Ranks as processes of this host that measure how they exchange tensors."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from shoal.devices import cpu
from shoal.devices.numa import share_cores
from shoal.errors import EngineError, RankFailed
from shoal.transport.channel import ChannelClosed, wait
from shoal.transport.process import ChildProcess, end_all

_SILENCE_LIMIT_S = 180.0  # the measurement fails if no rank answers for so long


def measure_on_ranks(
    measurement: Literal["operations", "experts"], ranks: int, question: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Have each rank measure something, and return the answers of all. Each rank has a core, if there are enough.

    Args:
        measurement: its name in `worker.bench_rank`.
        question: what the ranks need to know, for JSON.

    Raises:
        RankFailed: a rank died or stands still.
        EngineError: the ranks could not reach each other, or a rank has found a mistake.
    """
    store, hardware = os.memfd_create("shoal-store"), cpu.discover()
    own = [cores[:1] for cores in share_cores(hardware.cores, ranks, hardware.nodes)]
    text = json.dumps({**question, "measurement": measurement, "ranks": ranks, "cores": own})
    children: list[ChildProcess] = []
    try:
        for rank in range(ranks):
            arguments = ["--rank", str(rank), "--store", str(store), "--question", text]
            environment = cpu.pinning_environment(own[rank])
            children.append(ChildProcess("shoal.worker.bench_rank", arguments, environment, [store]))
        return _collect(children)
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
