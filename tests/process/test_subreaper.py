"""Tests of the adoption of orphans."""

import os
import subprocess
import sys
import threading

import pytest

from shoal.process.subreaper import subreaper

pytestmark = pytest.mark.slow  # starts processes

# A program that starts another one, prints its number and ends. The other one ends with its standard input.
ENDS_BEFORE_ITS_CHILD = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdout=subprocess.DEVNULL)
print(child.pid)
"""


def parent_of_an_orphan() -> int:
    """Return the parent that the kernel gives to a process whose parent ends."""
    read, write = os.pipe()
    try:
        command = [sys.executable, "-c", ENDS_BEFORE_ITS_CHILD]
        pid = int(subprocess.run(command, stdin=read, stdout=subprocess.PIPE, text=True, check=True, timeout=60).stdout)
        with open(f"/proc/{pid}/stat") as stat:
            parent = int(stat.read().rpartition(")")[2].split()[1])
    finally:
        os.close(read)
        os.close(write)
    if parent == os.getpid():
        os.waitpid(pid, 0)
    return parent


def test_orphans_are_adopted_while_someone_wants_them() -> None:
    assert parent_of_an_orphan() != os.getpid()
    subreaper.hold()
    thread = threading.Thread(target=subreaper.hold)
    thread.start()
    thread.join()
    assert parent_of_an_orphan() == os.getpid()
    subreaper.release()
    assert parent_of_an_orphan() == os.getpid()
    subreaper.release()
    assert parent_of_an_orphan() != os.getpid()
