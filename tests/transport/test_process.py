"""What is said of processes that have ended."""

import os
import signal
import time

import pytest

from shoal.transport.process import ChildProcess


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (signal.SIGKILL, "SIGKILL"),
        (signal.SIGABRT, "SIGABRT"),
        (signal.SIGBUS, "SIGBUS: a file that it had mapped was truncated, or there is no room in /dev/shm"),
        (signal.SIGRTMIN + 1, "signal 35"),
    ],
)
def test_the_signal_that_killed_it_is_named(number: int, name: str) -> None:
    child = ChildProcess("shoal.server.api_process")
    try:
        os.kill(child.pid, number)
        assert child.wait(60)
        assert child.death() == f"was killed by {name}"
    finally:
        child.kill()


def test_nobody_waits_long_to_learn_how_it_ended() -> None:
    child = ChildProcess("shoal.server.api_process")
    try:
        os.kill(child.pid, signal.SIGSTOP)  # it will not end by itself
        begun = time.monotonic()
        assert child.death(0.0) == "closed its channel, and has not ended yet"
        assert time.monotonic() - begun < 30
    finally:
        child.kill()
