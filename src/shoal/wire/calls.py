"""Messages between processes that run the same program: the one that leads has the engine, the others its answers."""

import msgspec

from shoal.outputs import BeamSearchOutput, RequestOutput
from shoal.wire.base import Wire
from shoal.wire.engine import EngineStats

FOLLOWERS_DOOR = "followers"  # the name of the door through which the other processes come


class CallError(Wire, frozen=True):
    """An error that a call has raised."""

    kind: str  # the name of its class in `shoal.errors`
    message: str
    param: str | None = None  # of a RequestError; `code` too
    code: str | None = None
    outputs: dict[int, RequestOutput] = msgspec.field(default_factory=dict)  # of a ReplicasFailed


class EngineReady(Wire, frozen=True):
    """A note that the engine is ready."""

    stats: EngineStats


class CallAnswer(Wire, frozen=True):
    """The result of a call."""

    number: int  # of the call, from 1 on
    call: str  # a description of it
    digest: str  # of its arguments
    outputs: tuple[RequestOutput, ...] | None = None
    beams: tuple[BeamSearchOutput, ...] | None = None
    error: CallError | None = None


class LeaderFailed(Wire, frozen=True):
    """The reason why there is no engine."""

    error: CallError


ToFollower = EngineReady | CallAnswer | LeaderFailed

to_follower: msgspec.msgpack.Decoder[ToFollower] = msgspec.msgpack.Decoder(ToFollower)
