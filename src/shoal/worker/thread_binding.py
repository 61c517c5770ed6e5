"""Binding the threads of a process to cores, after its libraries were loaded."""

import os

import torch

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


def _tasks() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/task")}
