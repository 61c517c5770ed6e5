"""`shoal scale` changes the number of replicas, prints each change, and waits until all are ready."""

import asyncio
import sys
from collections.abc import Callable, Sequence

import pytest

from shoal.cli import commands
from shoal.client.scale import scale_server
from shoal.errors import EngineError, UserError
from shoal.wire.fleet import FleetStatus
from support.fleet_status import fleet, replica
from support.status_server import StatusServer


class Fleet:
    """A fleet whose new replicas change to the next of `states` with every reading of the status."""

    def __init__(self, count: int, states: Sequence[str] = ("restarting", "starting", "ready")) -> None:
        self.states = dict.fromkeys(range(count), "ready")
        self.wanted = 0
        self._start_states = states

    def scale(self, count: int) -> None:
        self.wanted = count
        self.states |= dict.fromkeys(range(len(self.states), count), self._start_states[0])
        self.states |= dict.fromkeys(range(count, len(self.states)), "leaving")

    def __call__(self) -> FleetStatus:
        seen = dict(self.states)
        for number, state in seen.items():
            if state == "leaving":
                del self.states[number]
            elif state in self._start_states[:-1]:
                self.states[number] = self._start_states[self._start_states.index(state) + 1]
        return fleet(*(replica(number, state, cause="out of memory") for number, state in seen.items()))


def run_scale(fleet: Fleet, count: int, *, timeout: float = 60) -> list[str]:
    told: list[str] = []
    with StatusServer(fleet) as server:
        server.scale = fleet.scale
        asyncio.run(scale_server(server.url, count, tell=told.append, timeout=timeout))
    return told


def test_more_replicas() -> None:
    assert run_scale(Fleet(1, states=("starting", "ready")), 3) == [
        "1 replica now, 3 wanted",
        "replica 1 is starting",
        "replica 2 is starting",
        "replica 1 is ready",
        "replica 2 is ready",
        "3 replicas ready",
    ]


def test_fewer_replicas() -> None:
    assert run_scale(Fleet(2), 1) == [
        "2 replicas now, 1 wanted",
        "replica 1 is leaving",
        "replica 1 has left",
        "1 replica ready",
    ]


def test_the_same_number() -> None:
    assert run_scale(Fleet(2), 2) == ["2 replicas now, 2 wanted", "2 replicas ready"]


def test_a_replica_that_is_given_up() -> None:
    with pytest.raises(EngineError, match="replica 1 was given up: out of memory"):
        run_scale(Fleet(1, states=("starting", "failed")), 2)


def test_the_deadline() -> None:
    with pytest.raises(EngineError, match=r"not done within 0 s: 1 ready, 1 starting"):
        run_scale(Fleet(1, states=("starting",)), 2, timeout=0)


def test_a_refusal() -> None:
    told: list[str] = []
    with StatusServer(Fleet(1)) as server:
        server.broken = True
        with pytest.raises(UserError, match="share experts"):
            asyncio.run(scale_server(server.url, 2, tell=told.append))


def test_the_commands(capsys: pytest.CaptureFixture[str], run_shoal: Callable[..., int]) -> None:
    replicas = Fleet(1)
    with StatusServer(replicas) as server:
        server.scale = replicas.scale
        assert run_shoal("scale", server.url, "2") == 0
        assert "2 replicas ready" in capsys.readouterr().out
        assert run_shoal("top", server.url, "--once", "--interval", "0.1") == 0
        assert "2 of 2 replicas ready" in capsys.readouterr().out
        url = server.url
    assert run_shoal("scale", url, "0") == 2
    assert run_shoal("top", url) == 2
    assert f"error: no server at {url}: connection refused" in capsys.readouterr().err


@pytest.fixture
def run_shoal(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["shoal", *arguments])
        return commands.run()

    return run
