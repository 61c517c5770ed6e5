"""Programs that tests start, with all that they print."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

_WAIT_S = 240.0


class Program:
    """A command with all that it prints."""

    def __init__(self, command: Sequence[str], **environment: str) -> None:
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the program
        self.process = subprocess.Popen(
            command, stdout=self._output, stderr=subprocess.STDOUT, env={**os.environ, **environment}
        )

    @property
    def text(self) -> str:
        return os.pread(self._output.fileno(), 1 << 22, 0).decode()

    def has_ended(self, timeout: float) -> bool:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout)
        return self.process.poll() is not None

    def await_end(self) -> int:
        return self.process.wait(_WAIT_S)

    def await_text(self, *texts: str) -> None:
        """Wait until the program has printed one of the texts."""
        deadline = time.monotonic() + _WAIT_S
        while not any(text in self.text for text in texts):
            assert not self.has_ended(0.02), self.text
            assert time.monotonic() < deadline, f"{texts} not in:\n{self.text}"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._output.close()


Start = Callable[..., Program]


@contextmanager
def started_programs() -> Iterator[Start]:
    """Give a function that starts a program. At the end of the block, all of them are killed."""
    started: list[Program] = []

    def run(command: Sequence[str], **environment: str) -> Program:
        started.append(Program(command, **environment))
        return started[-1]

    try:
        yield run
    finally:
        for program in started:
            print(program.text, file=sys.stderr)  # if the test fails
            program.close()


def found_by(program: Program) -> list[dict[str, Any]]:
    """Return the objects that the processes of a program have printed after the word FOUND."""
    decoder = json.JSONDecoder()
    return [decoder.raw_decode(part)[0] for part in program.text.split("FOUND")[1:]]
