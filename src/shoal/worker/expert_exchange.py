"""The measurement of the exchange of tokens with experts on other ranks, for `shoal bench comm --pattern moe`."""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from shoal.comm.base import Communicator
from shoal.comm.select import Requested
from shoal.parallel.all2all.backends import BACKENDS, make_dispatch
from shoal.parallel.dispatch import Dispatch
from shoal.parallel.expert_placement import place_experts
from shoal.parallel.mesh import Mesh, make_mesh
from shoal.parallel.topology import Topology


@torch.inference_mode()
def measure(
    connect: Callable[[str, Requested], Communicator], rank: int, question: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Measure every way to experts with every number of tokens. Each rank is a replica of its own.

    Each result has the number of tokens, the backend, the median time of a layer's dispatch and combine in
    microseconds, and the bytes that this rank has sent in one exchange.
    """
    topology = Topology.of(dp=question["ranks"])
    mesh = make_mesh(topology, rank, lambda axis, _: connect(axis, "auto"), expert_parallel=True)
    placement = place_experts(question["experts"], mesh.ep.size, "linear")
    for tokens in question["tokens"]:
        for backend in BACKENDS:
            dispatch = make_dispatch(mesh, placement, backend, torch.device("cpu"))
            yield {"tokens": tokens, "backend": backend, **_exchange(mesh, dispatch, tokens, question)}


def _exchange(mesh: Mesh, dispatch: Dispatch, tokens: int, question: dict[str, Any]) -> dict[str, float]:
    """Measure one backend with one number of tokens. The experts return their input; their arithmetic is left out."""
    generator = torch.Generator().manual_seed(mesh.ep.rank)
    x = torch.randn(tokens, question["hidden_size"], generator=generator).to(getattr(torch, question["dtype"]))
    experts = torch.rand(tokens, question["experts"], generator=generator).topk(question["top_k"]).indices
    weights = torch.rand(experts.shape, generator=generator)
    dispatch.begin_step(tokens)
    times, sent = [], 0
    for _ in range(1 + question["repeat"]):  # the first run is not counted
        mesh.ep.comm.barrier()
        before, begun = _sent_bytes(mesh), time.perf_counter()
        routed = dispatch.dispatch(x, experts, weights)
        dispatch.combine(routed.x, None)
        times.append(time.perf_counter() - begun)
        sent = _sent_bytes(mesh) - before
    return {"us": 1e6 * statistics.median(times[1:]), "sent_bytes": sent}


def _sent_bytes(mesh: Mesh) -> int:
    return sum(total.sent_bytes for total in mesh.ep.comm.progress.read_totals().values())
