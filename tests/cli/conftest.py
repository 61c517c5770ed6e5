from collections.abc import Iterator

import pytest

from support.commands import Shoal, commands_here


@pytest.fixture
def shoal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Shoal]:
    """Return a function that runs a command in this process, restores signal handlers and returns the exit code."""
    with commands_here(monkeypatch) as run:
        yield run
