"""Binding the threads of a process to cores, after its libraries were loaded, and their memory to a NUMA node."""

import os

import torch

from shoal.devices.memory_policy import prefer_memory_of
from shoal.log import get_logger

log = get_logger("worker")

_ENOUGH = 1 << 16  # numbers for each thread, so that PyTorch gives each a share


def bind_threads(cores: tuple[int, ...]) -> None:
    """Give this process the cores, and each thread that computes for this thread a core of its own.

    A new process needs no such call: the OpenMP runtime does it (`devices.cpu.pinning_environment`), but reads the
    variables for that only when it is loaded. It would also bind threads that it starts later. Those may run on all
    cores of the process here.
    """
    for task in _tasks():
        os.sched_setaffinity(task, cores)
    torch.set_num_threads(len(cores))
    before = _tasks()
    torch.zeros(_ENOUGH * len(cores)).add_(1)  # starts the threads
    for task, core in zip(sorted(_tasks() - before), cores[1:], strict=False):
        os.sched_setaffinity(task, {core})


def prefer_memory(rank: int, node: int | None) -> None:
    """Take memory for this thread, and for those that it will start, from the NUMA node that has the rank's cores."""
    if node is None:
        return
    refused = prefer_memory_of(node)
    if refused:
        log.info(f"rank {rank}: the kernel decides where its memory is, not NUMA node {node} alone ({refused})")
    else:
        log.info(f"rank {rank} takes memory from NUMA node {node}, which has its cores")


def _tasks() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/task")}
