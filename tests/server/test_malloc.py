"""Freed memory is returned to the operating system."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from pathlib import Path
from threading import Thread
from shoal.process.malloc import return_large_blocks

def resident() -> int:
    return int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0]) >> 10

if sys.argv[1] == "returned":
    return_large_blocks()
def work() -> None:
    for _ in range(3):
        large = bytearray(b"x" * (20 << 20))
        del large

before = resident()
thread = Thread(target=work)
thread.start()
thread.join()
print(resident() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
@pytest.mark.parametrize(("how", "least", "most"), [("returned", -1, 2), ("kept by default", 10, 100)])
def test_large_blocks_of_a_thread_are_returned(how: str, least: int, most: int) -> None:
    """`least` and `most` are the MiB by which the process may have grown after blocks of 20 MiB."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    assert least <= int(done.stdout) <= most
