"""Tests of communication between stages: order, sends that do not wait for the receiver, and their limit."""

import threading

import pytest
import torch

from shoal.comm.base import Communicator
from shoal.comm.local import LocalComm
from shoal.comm.threads import ThreadComm, ThreadGroup
from shoal.comm.torch_distributed import TorchComm, c10d
from shoal.parallel.mesh import Axis
from shoal.parallel.pipeline import Pipeline
from shoal.parallel.stages import MAX_PENDING_SENDS
from support.fakes import on_threads

CPU = torch.device("cpu")
WIDTH, DEPTH = 512, 3


def groups(kind: str, size: int, name: str) -> list[Communicator]:
    if kind == "threads":
        group = ThreadGroup(size, 60)
        return [ThreadComm(group, rank) for rank in range(size)]
    store = c10d.HashStore()
    return on_threads(size, lambda rank: TorchComm(store, name, rank, size, backend="gloo", timeout_s=60, device=CPU))


def stages(kind: str, size: int) -> list[Pipeline]:
    return stages_over(groups(kind, size, "pp"), groups(kind, 2, "token_return"))


def stages_over(between: list[Communicator], ends: list[Communicator]) -> list[Pipeline]:
    size = len(between)
    found = []
    for rank in range(size):
        alone = Axis("token_return", 0, 1, LocalComm())
        token_return = {0: Axis("token_return", 0, 2, ends[0]), size - 1: Axis("token_return", 1, 2, ends[1])}.get(
            rank, alone
        )
        pp = Axis("pp", rank, size, between[rank])
        found.append(Pipeline(pp, token_return, width=WIDTH, dtype=torch.float32, device=CPU, depth=DEPTH))
    return found


def test_a_pipeline_of_one_is_first_and_last() -> None:
    alone = Axis("pp", 0, 1, LocalComm())
    pipeline = Pipeline(alone, alone, width=WIDTH, dtype=torch.float32, device=CPU, depth=DEPTH)
    assert pipeline.first
    assert pipeline.last
    assert pipeline.pending_send_bytes(100) == 0


@pytest.mark.parametrize("kind", ["threads", "gloo"])
@pytest.mark.parametrize("size", [2, 3])
def test_streams_go_on_and_tokens_come_back(kind: str, size: int) -> None:
    """As in an engine, the first stage is ahead by the steps in flight, then reads the tokens of the oldest step."""
    steps = 12
    rows = [(7 * step) % 5 + 1 for step in range(steps)]
    pipelines = stages(kind, size)

    def run(rank: int) -> list[float]:
        pipeline, seen = pipelines[rank], []
        for step in range(steps):
            if pipeline.first:
                if step >= DEPTH:
                    seen.append(float(pipeline.receive_tokens(2)[1]))
                stream = torch.full((rows[step], WIDTH), float(step))
            else:
                stream = pipeline.receive(rows[step])
                assert stream.shape == (rows[step], WIDTH)
                assert stream.unique().tolist() == [step + rank - 1]
                stream = stream + 1
            if pipeline.last:
                pipeline.send_tokens(torch.tensor([step, int(stream[0, 0])]))
            else:
                pipeline.send(stream)
        if pipeline.first:
            seen += [float(pipeline.receive_tokens(2)[1]) for _ in range(DEPTH)]
        return seen

    assert on_threads(size, run)[0] == [step + size - 1 for step in range(steps)]
    assert pipelines[0].waited_ns > 0
    assert pipelines[0].pending_send_bytes(10) == MAX_PENDING_SENDS * 10 * WIDTH * 4
    assert pipelines[-1].pending_send_bytes(10) == 0


@pytest.mark.parametrize("kind", ["threads", "gloo"])
def test_a_sender_does_not_wait_for_the_receiver(kind: str) -> None:
    """Some sends return before the first is received, though no buffer holds their megabytes; the next one waits."""
    between = groups(kind, 2, "pp")
    first, second = stages_over(between, groups(kind, 2, "token_return"))
    sent, ahead = threading.Event(), threading.Event()

    def run(rank: int) -> list[float]:
        if rank == 0:
            for step in range(MAX_PENDING_SENDS):
                first.send(torch.full((2000, WIDTH), float(step)))
            sent.set()
            first.send(torch.full((2000, WIDTH), float(MAX_PENDING_SENDS)))
            assert ahead.is_set(), "it waited until the first was received"
            return [float(first.receive_tokens(1)) for _ in range(MAX_PENDING_SENDS + 1)]
        assert sent.wait(60)
        while between[0].progress.operation != "send":
            pass
        ahead.set()
        for _ in range(MAX_PENDING_SENDS + 1):
            second.send_tokens(second.receive(2000)[:1, 0].long())
        return []

    assert on_threads(2, run)[0] == list(range(MAX_PENDING_SENDS + 1))
    assert first.waited_ns > 0
