"""Two hosts on this machine, and programs on them."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from support import hosts
from support.host_programs import Program


@pytest.fixture(scope="module")
def two() -> Iterator[tuple[hosts.Host, hosts.Host]]:
    with hosts.two_hosts() as found:
        yield found


@pytest.fixture
def start() -> Iterator[Callable[..., Program]]:
    started: list[Program] = []

    def run(host: hosts.Host, *arguments: str, **rest: Any) -> Program:
        started.append(Program(host, *arguments, **rest))
        return started[-1]

    try:
        yield run
    finally:
        for program in started:
            print(f"--- {program.arguments} on {program.host.netns}:\n{program.text}", file=sys.stderr)  # if it fails
            program.close()
