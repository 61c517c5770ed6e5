import signal
import sys
from collections.abc import Callable, Iterator

import pytest

from shoal.cli import main as program

Shoal = Callable[..., int]


@pytest.fixture
def shoal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Shoal]:
    """Return a function that runs a command in this process, restores signal handlers and returns the exit code."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["shoal", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            program.main()
        code = ended.value.code
        assert isinstance(code, int)
        return code

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
