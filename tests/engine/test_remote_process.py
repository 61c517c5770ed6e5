"""The way back to a front end that was there before."""

from collections.abc import Iterator
from typing import Any

import pytest

from shoal.engine.remote_process import await_front_end
from shoal.errors import ConfigError, EngineError
from shoal.transport.channel import Channel


class FakeFrontEnd:
    address = "10.0.0.1:29550"

    def __init__(self, answers: list[Any]) -> None:
        self.answers = answers

    def connect(self, *, returning: bool) -> Any:
        assert returning
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


class FakeEngine:
    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.checks = 0

    def check(self) -> None:
        self.checks += 1
        if self.error is not None:
            raise self.error


@pytest.fixture
def supervisor() -> Iterator[tuple[Channel, Channel]]:
    """Both ends."""
    ours, theirs = Channel.pair()
    with theirs:
        yield ours, Channel(theirs)
    ours.close()


def back(answers: list[Any], supervisor: Channel, engine: FakeEngine | None = None) -> Any:
    return await_front_end(FakeFrontEnd(answers), supervisor, engine)  # type: ignore[arg-type]


def test_it_is_looked_for_as_long_as_it_takes(
    supervisor: tuple[Channel, Channel], caplog: pytest.LogCaptureFixture
) -> None:
    engine = FakeEngine()
    assert back([EngineError("no answer")] * 50 + ["there"], supervisor[0], engine) == "there"
    assert engine.checks == 50, "its ranks are looked at meanwhile"
    assert caplog.messages.count("still waiting for the front end at 10.0.0.1:29550: no answer") == 50
    assert back([EngineError("no answer"), "there"], supervisor[0]) == "there", "nothing is loaded yet"


def test_one_that_wants_other_options_is_not_asked_again(supervisor: tuple[Channel, Channel]) -> None:
    with pytest.raises(ConfigError, match="its dtype"):
        back([EngineError("no answer"), ConfigError("its dtype is another one")], supervisor[0])


def test_a_rank_that_fails_meanwhile_is_told_of(supervisor: tuple[Channel, Channel]) -> None:
    with pytest.raises(EngineError, match="rank 0 died"):
        back([EngineError("no answer")], supervisor[0], FakeEngine(EngineError("rank 0 died")))


def test_the_supervisor_ends_it(supervisor: tuple[Channel, Channel]) -> None:
    supervisor[1].send(b"end")
    supervisor[1].flush(60)
    assert back([], supervisor[0]) is None
