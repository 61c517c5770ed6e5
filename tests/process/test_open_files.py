"""Tests of the limit of open files, each in a process of its own."""

import subprocess
import sys

import pytest

SHOW = """
import resource
from shoal.process import open_files
print(open_files.raise_limit(), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.slow
@pytest.mark.parametrize("most", [300, 900])
def test_the_soft_limit_is_raised_to_the_hard_limit(most: int) -> None:
    command = ["sh", "-c", f'ulimit -Sn 256; ulimit -Hn {most}; exec "$0" -c "$1"', sys.executable, SHOW]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == [str(most)] * 3
