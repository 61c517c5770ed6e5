"""Binding the threads of a process to cores, after its libraries were loaded, and their memory to a NUMA node."""

import os

import torch

from shoal.devices.memory_policy import prefer_memory_of
from shoal.log import get_logger

log = get_logger("worker")

_ENOUGH = 1 << 16  # numbers for each thread, so that PyTorch gives each a share


def bind_threads(cores: tuple[int, ...]) -> None:
    """Give each thread that computes for this thread a core of its own, and the process's other threads all cores.

    Without that two threads of a matrix product share a core so often that it may take ten times as long. A process
    that loads PyTorch itself leaves it to the OpenMP runtime (`devices.cpu.pinning_environment`), which reads its
    variables only when it is loaded. Threads that this thread starts later share its core.
    """
    for task in _tasks():
        os.sched_setaffinity(task, cores)
    torch.set_num_threads(len(cores))
    before = _tasks()
    torch.zeros(_ENOUGH * len(cores)).add_(1)  # starts the threads
    for task, core in zip(sorted(_tasks() - before), cores[1:], strict=False):
        os.sched_setaffinity(task, {core})
    os.sched_setaffinity(0, {cores[0]})


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
