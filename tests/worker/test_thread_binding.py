"""Binding the threads of a process that has loaded PyTorch before."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json
import os
import torch
from shoal.worker.thread_binding import bind_threads

cores = sorted(os.sched_getaffinity(0))[-2:]
before = set(os.listdir("/proc/self/task"))
bind_threads(tuple(cores))
torch.zeros(1 << 20).add_(1)
new = sorted(set(os.listdir("/proc/self/task")) - before, key=int)
print(json.dumps([cores, torch.get_num_threads(), *(sorted(os.sched_getaffinity(int(task))) for task in ["0", *new])]))
"""


@pytest.mark.slow  # loads PyTorch in another process
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_each_thread_that_computes_has_a_core_of_its_own() -> None:
    """OpenMP starts one more thread for two cores."""
    found = json.loads(subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, check=True).stdout)
    cores, count, caller, *others = found
    assert (count, caller, others.count(cores[1:])) == (2, cores[:1], 1)
    assert all(each in (cores, cores[1:]) for each in others)  # PyTorch has another thread, which computes nothing here
