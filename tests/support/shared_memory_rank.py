"""The last rank of three groups in a process of its own: `python shared_memory_rank.py SOURCE FD GROUP...`.

It spins when it has added with the others of each group. Rank 1 makes its calls in replays, if there are native
kernels.
"""

import sys

if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])

import torch
from torch import Tensor

from shoal.comm.process_comm import ProcessComm
from shoal.comm.shared_file_store import SharedFileStore
from shoal.kernels.native import load_native
from shoal.kernels.native_calls import sum_over
from shoal.kernels.recording import Pool, Recorder

TIMEOUT_S = 1.0
SIZE = 3


def all_reduce(comm: ProcessComm, x: Tensor) -> Tensor:
    if comm.rank != 1 or load_native()[0] is None:
        return comm.all_reduce(x)
    with Recorder(Pool()) as recorder:
        sum_over(comm, x)
    recorder.recording().replay()
    return x


def connect_and_add(store: SharedFileStore, group: str, rank: int) -> ProcessComm:
    """Return the communicator of a rank, after 20 sums with the others."""
    store.set(f"imported {group} {rank}", "")
    # No rank waits in an operation for an import.
    store.wait([f"imported {group} {each}" for each in range(SIZE)])
    comm = ProcessComm(store, group, rank, SIZE, requested="shm", timeout_s=TIMEOUT_S, device=torch.device("cpu"))
    for number in range(20):
        total = all_reduce(comm, torch.full((1000,), float(rank + number)))
        assert total.tolist() == [float(sum(range(SIZE)) + number * SIZE)] * 1000
    return comm


def main(fd: int, groups: list[str]) -> None:
    store = SharedFileStore(fd, timeout_s=60)
    comms = [connect_and_add(store, group, SIZE - 1) for group in groups]
    print("ready", flush=True)
    while comms:
        pass


if __name__ == "__main__":
    main(int(sys.argv[2]), sys.argv[3:])
