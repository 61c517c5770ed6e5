"""A rank that measures the exchange of tensors with others, for `shoal bench comm`.

There is a process for each rank: `python -m shoal.worker.bench_rank --fd N --parent PID ...`. It answers with frames of
JSON: one for each thing that it has measured, and a last one.
"""

import json
import signal
from collections.abc import Callable, Iterator
from typing import Any

import click
import torch

from shoal.comm.base import Communicator
from shoal.comm.process_comm import ProcessComm
from shoal.comm.select import Requested
from shoal.comm.shared_file_store import SharedFileStore
from shoal.errors import ShoalError
from shoal.transport.channel import Channel
from shoal.transport.process import die_with_parent
from shoal.worker import comm_operations, expert_exchange

_COMM_TIMEOUT_S = 60.0
_FLUSH_S = 10.0

# A function that forms a group of all ranks, by its name and the backend that is asked for.
_Connect = Callable[[str, Requested], Communicator]

# Name -> a function that yields answers. Its arguments are a `_Connect`, the rank, and the question.
_MEASUREMENTS: dict[str, Callable[[_Connect, int, dict[str, Any]], Iterator[dict[str, Any]]]] = {
    "operations": comm_operations.measure,
    "experts": expert_exchange.measure,
}


@click.command()
@click.option("--fd", type=int, required=True)
@click.option("--parent", type=int, required=True)
@click.option("--rank", type=int, required=True)
@click.option("--store", type=int, required=True)
@click.option("--question", "text", required=True, help="what to measure, as JSON")
def main(fd: int, parent: int, rank: int, store: int, text: str) -> None:
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent ends its children
    torch.set_num_threads(1)
    channel, question = Channel.from_fd(fd), json.loads(text)

    def connect(group: str, backend: Requested) -> Communicator:
        return ProcessComm(
            *(SharedFileStore(store, timeout_s=_COMM_TIMEOUT_S), group, rank, question["ranks"]),
            requested=backend,
            timeout_s=_COMM_TIMEOUT_S,
            device=torch.device("cpu"),
            cores=question["cores"][rank],
        )

    try:
        for answer in _MEASUREMENTS[question["measurement"]](connect, rank, question):
            channel.send(json.dumps(answer).encode())
        channel.send(json.dumps({"done": True}).encode())
    except ShoalError as error:
        channel.send(json.dumps({"error": str(error)}).encode())
    channel.flush(_FLUSH_S)


if __name__ == "__main__":
    main()
