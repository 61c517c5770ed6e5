"""Reconnecting to a front end that was there before."""

from collections.abc import Iterator
from typing import Any

import pytest

from shoal.engine.remote_process import ReplannedError, await_front_end, differences
from shoal.errors import ConfigError, EngineError
from shoal.transport.channel import Channel
from shoal.wire.base import replace_fields
from shoal.wire.plan import ReplicaPlace
from support.plans import bare_plan


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
    """Return both ends of a supervisor's channel."""
    ours, theirs = Channel.pair()
    with theirs:
        yield ours, Channel(theirs)
    ours.close()


def reconnect(answers: list[Any], supervisor: Channel, engine: FakeEngine | None = None) -> Any:
    return await_front_end(FakeFrontEnd(answers), supervisor, engine)  # type: ignore[arg-type]


def test_a_front_end_is_awaited_without_a_time_limit(
    supervisor: tuple[Channel, Channel], caplog: pytest.LogCaptureFixture
) -> None:
    engine = FakeEngine()
    assert reconnect([EngineError("no answer")] * 50 + ["there"], supervisor[0], engine) == "there"
    assert engine.checks == 50, "the ranks are checked while it waits"
    assert caplog.messages.count("still waiting for the front end at 10.0.0.1:29550: no answer") == 50
    assert reconnect([EngineError("no answer"), "there"], supervisor[0]) == "there", (
        "without an engine, which is not loaded yet"
    )


def test_a_front_end_that_refuses_the_replica_is_not_tried_again(supervisor: tuple[Channel, Channel]) -> None:
    with pytest.raises(ConfigError, match="its dtype"):
        reconnect([EngineError("no answer"), ConfigError("its dtype is another one")], supervisor[0])


def test_a_rank_failure_while_waiting_is_raised(supervisor: tuple[Channel, Channel]) -> None:
    with pytest.raises(EngineError, match="rank 0 died"):
        reconnect([EngineError("no answer")], supervisor[0], FakeEngine(EngineError("rank 0 died")))


def test_the_supervisor_ends_the_wait(supervisor: tuple[Channel, Channel]) -> None:
    supervisor[1].send(b"end")
    supervisor[1].flush(60)
    assert reconnect([], supervisor[0]) is None


def test_a_front_end_with_another_plan_ends_the_wait(supervisor: tuple[Channel, Channel]) -> None:
    with pytest.raises(ReplannedError, match="another plan"):
        reconnect([EngineError("no answer"), ReplannedError("another plan")], supervisor[0])


def test_plans_differ_only_in_what_a_running_replica_obeys() -> None:
    plan = bare_plan()
    assert differences(plan, replace_fields(plan, reasons=("why",), place=ReplicaPlace(meeting=4))) == []
    assert differences(plan, replace_fields(plan, max_num_seqs=7, seed=3)) == ["max_num_seqs", "seed"]
