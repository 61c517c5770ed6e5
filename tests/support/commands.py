"""Commands of `shoal` that run in this process, which need not import what it has already."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from shoal.cli import main as program

Shoal = Callable[..., int]


@contextmanager
def commands_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[Shoal]:
    """Give a function that runs a command and returns its exit code. Signal handlers are restored at the end."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["shoal", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            program.main()
        code = ended.value.code
        assert isinstance(code, int)
        return code

    try:
        yield run
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
