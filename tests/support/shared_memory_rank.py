"""A rank in a process of its own, for tests of shared memory: `python shared_memory_rank.py SOURCE FD RANK SIZE WORK`.

WORK: how the last rank ends in the middle of an all-reduce: `killed`, `stopped` or `spinning`. Rank 1 makes its calls
in replays, if there are native kernels.
"""

import os
import signal
import sys

sys.path.insert(0, sys.argv[1])

import torch
from torch import Tensor

from shoal.comm.process_comm import ProcessComm
from shoal.comm.shared_file_store import SharedFileStore
from shoal.errors import CommError
from shoal.kernels.native import load_native
from shoal.kernels.native_calls import sum_over
from shoal.kernels.recording import Pool, Recorder

TIMEOUT_S = 1.0


def all_reduce(comm: ProcessComm, x: Tensor) -> Tensor:
    if comm.rank != 1 or load_native()[0] is None:
        return comm.all_reduce(x)
    with Recorder(Pool()) as recorder:
        sum_over(comm, x)
    recorder.recording().replay()
    return x


def main(fd: int, rank: int, size: int, work: str) -> None:
    store = SharedFileStore(fd, timeout_s=60)
    store.set(f"imported {rank}", "")
    store.wait([f"imported {each}" for each in range(size)])  # so that no rank waits in an operation for an import
    comm = ProcessComm(store, "g", rank, size, requested="shm", timeout_s=TIMEOUT_S, device=torch.device("cpu"))
    for number in range(20):
        total = all_reduce(comm, torch.full((1000,), float(rank + number)))
        assert total.tolist() == [float(sum(range(size)) + number * size)] * 1000
    print("ready", flush=True)
    last = rank == size - 1
    if last and work == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if last and work == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    while last and work == "spinning":
        pass
    try:
        all_reduce(comm, torch.ones(1))
        print("done", flush=True)
    except CommError as error:
        print(error, flush=True)


main(int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
