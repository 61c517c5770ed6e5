"""How an engine's server ends: who hears what, and in which order."""

import pytest

from shoal import wire
from shoal.cluster.lockstep import Joined
from shoal.engine.core import EngineCore
from shoal.errors import ConfigError, EngineError
from shoal.frontend.engine_server import serve
from shoal.transport.channel import Channel


class Peers:
    """A lockstep whose other members may have failed."""

    backlog = False

    def __init__(self, failure: str = "") -> None:
        self.failure = failure
        self.told: list[str] = []

    def launched(self, count: int) -> None:
        raise NotImplementedError

    def due(self) -> int:
        if self.failure:
            raise EngineError(self.failure)
        return 0

    def fileno(self) -> int:
        raise NotImplementedError

    def quiet(self) -> None:
        raise NotImplementedError

    def close(self, why: str = "") -> None:
        self.told.append(why)


def ended(peers: Peers, error: Exception) -> tuple[int, wire.EngineFailure]:
    """The exit code, and what the client is told."""
    client, theirs = Channel.pair()
    engine = Channel(theirs)
    client.send(wire.encode(wire.EngineSetup("model", {}, wire.Place(1, 2))))

    def start(setup: wire.EngineSetup, lockstep: Joined | None) -> EngineCore:
        raise error

    code = serve(engine, lambda setup: peers, start)
    (frame,) = client.receive()
    failure = wire.from_engine.decode(frame)
    assert isinstance(failure, wire.EngineFailure)
    engine.close()
    client.close()
    return code, failure


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ConfigError("no such model"), 2, "no such model"),
        (EngineError("out of memory"), 1, "out of memory"),
        (ValueError("a bug"), 1, "ValueError: a bug"),
    ],
)
def test_what_fails_at_start_is_told_to_all(error: Exception, code: int, told: str) -> None:
    peers = Peers()
    assert ended(peers, error) == (code, wire.EngineFailure(told, code == 2))
    assert peers.told[0] == f"replica 1: {told}"


def test_another_ones_failure_is_the_cause() -> None:
    peers = Peers("replica 0 (host, process 7) is out of memory")
    assert ended(peers, EngineError("no connection")) == (1, wire.EngineFailure(peers.failure, user_error=False))


def test_the_others_hear_of_it_before_the_client_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client may end the process with the first word."""
    peers = Peers()
    send = Channel.send

    def watched(channel: Channel, frame: bytes) -> None:
        sent_before.append(bool(peers.told))
        send(channel, frame)

    sent_before: list[bool] = []
    monkeypatch.setattr(Channel, "send", watched)
    ended(peers, EngineError("out of memory"))
    assert sent_before == [False, True], "the setup, and the failure"
