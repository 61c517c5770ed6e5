"""Tests of the descriptions of processes that have ended."""

import os
import signal
import time

import pytest

from shoal.transport.process import ChildProcess


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "name"),
    [
        (signal.SIGKILL, "SIGKILL"),
        (signal.SIGABRT, "SIGABRT"),
        (signal.SIGBUS, "SIGBUS: a file that it had mapped was truncated, or /dev/shm is full"),
        (signal.SIGRTMIN + 1, "signal 35"),
    ],
)
def test_a_killed_process_names_the_signal(number: int, name: str) -> None:
    child = ChildProcess("shoal.server.api_process")
    try:
        os.kill(child.pid, number)
        assert child.wait(60)
        assert child.describe_exit() == f"was killed by {name}"
    finally:
        child.kill()


@pytest.mark.slow
def test_a_description_waits_no_longer_than_its_patience() -> None:
    child = ChildProcess("shoal.server.api_process")
    try:
        os.kill(child.pid, signal.SIGSTOP)  # so that it does not end
        begun = time.monotonic()
        assert child.describe_exit(0.0) == "closed its channel, and has not ended yet"
        assert time.monotonic() - begun < 30
    finally:
        child.kill()
