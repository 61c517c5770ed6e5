"""A measurement of the exchange of tokens with experts on other ranks, for `shoal bench`.

There is a process for each rank, and each rank is a replica of its own:
`python -m shoal.worker.expert_exchange --fd N --parent PID ...`. It answers with frames of JSON: one for each backend
and number of tokens, and a last one.
"""

import json
import signal
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import click
import torch

from shoal.comm.base import Communicator
from shoal.comm.process_comm import ProcessComm
from shoal.comm.shared_file_store import SharedFileStore
from shoal.errors import ShoalError
from shoal.parallel.all2all.backends import BACKENDS, make_dispatch
from shoal.parallel.dispatch import Dispatch
from shoal.parallel.expert_placement import place_experts
from shoal.parallel.mesh import Mesh, make_mesh
from shoal.parallel.topology import Topology
from shoal.transport.channel import Channel
from shoal.transport.process import die_with_parent

_COMM_TIMEOUT_S = 60.0
_FLUSH_S = 10.0


@click.command()
@click.option("--fd", type=int, required=True)
@click.option("--parent", type=int, required=True)
@click.option("--rank", type=int, required=True)
@click.option("--store", type=int, required=True)
@click.option("--question", "text", required=True, help="what to measure, as JSON")
def main(fd: int, parent: int, rank: int, store: int, text: str) -> None:
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent ends its children
    channel, question = Channel.from_fd(fd), json.loads(text)
    size = question["ranks"]

    def connect(axis: str, ranks: Sequence[int]) -> Communicator:
        file, cpu = SharedFileStore(store, timeout_s=_COMM_TIMEOUT_S), torch.device("cpu")
        return ProcessComm(file, axis, rank, size, timeout_s=_COMM_TIMEOUT_S, device=cpu)

    try:
        for answer in measure(make_mesh(Topology.of(dp=size), rank, connect, expert_parallel=True), question):
            channel.send(json.dumps(answer).encode())
        channel.send(json.dumps({"done": True}).encode())
    except ShoalError as error:
        channel.send(json.dumps({"error": str(error)}).encode())
    channel.flush(_FLUSH_S)


@torch.inference_mode()
def measure(mesh: Mesh, question: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Measure every backend with every number of tokens.

    Each result has the number of tokens, the backend, the median time of a layer's dispatch and combine in
    microseconds, and the bytes that this rank has sent in one exchange.
    """
    torch.set_num_threads(1)
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
        dispatch.combine(routed, routed.x, None)
        times.append(time.perf_counter() - begun)
        sent = _sent_bytes(mesh) - before
    return {"us": 1e6 * statistics.median(times[1:]), "sent_bytes": sent}


def _sent_bytes(mesh: Mesh) -> int:
    return sum(total.sent_bytes for total in mesh.ep.comm.progress.totals.values())


if __name__ == "__main__":
    main()
