"""Messages between a fleet and its front ends, and what a fleet says of itself."""

import msgspec

from shoal.wire.base import Stop, Wire
from shoal.wire.engine import EngineStats, Told, Updates
from shoal.wire.plan import ApiSetup


class Operation(Wire, frozen=True):
    """What an operator wants of all replicas: "pause", "resume", "sleep", "wake_up" or "reset_prefix_cache". `mode`:
    what becomes of requests, "abort", "wait" (those that a replica has end first) or "keep"."""

    verb: str
    mode: str = "abort"
    level: int = 1
    tags: tuple[str, ...] | None = None  # the parts that are taken again; None: all
    clear_cache: bool = True  # at a pause, unless requests are kept
    running: bool = False  # requests compute their blocks again after `reset_prefix_cache`


class ReplicaStatus(Wire, frozen=True):
    """A replica as its supervisor sees it. `state`: "starting", "ready", "restarting" (it has ended, and waits for its
    next start), "awaited" (another host starts it), "leaving", "failed" (it is not started again)."""

    number: int
    state: str
    host: str
    pid: int
    since_s: float  # seconds in this state
    restarts: int
    cause: str  # of its last end, "" if there was none
    held: int  # requests that it has
    stats: EngineStats | None  # its latest word; counters are sums over its lives


class FleetStatus(Wire, frozen=True):
    """All replicas behind one address."""

    model: str
    tp: int  # of each replica
    pp: int
    replicas: tuple[ReplicaStatus, ...]
    queued: int  # requests that no replica has yet
    replays: int  # how often a request went on after the end of the replica that had it
    accepting: bool  # False: it drains, or has failed
    uptime_s: float
    failure: str = ""
    max_model_len: int = 0  # tokens of a prompt and its output; 0: not known before a replica is ready
    activity: str = "awake"  # or "paused" or "asleep"
    sleep_level: int = 0
    missing: tuple[str, ...] = ()  # of "weights" and "kv_cache", what was given back


class StoredTurn(Wire, frozen=True):
    """Items of a stored conversation in their order: what one side said."""

    items: bytes  # a list, in JSON
    ids: tuple[str, ...]  # of those that have one


class KeepResponse(Wire, frozen=True):
    """A response to be stored. `previous`: the one that it goes on from; `before`: all up to that, in case it is not
    there any more."""

    id: str
    response: bytes  # in JSON
    said: StoredTurn
    answer: StoredTurn
    previous: str | None = None
    before: tuple[StoredTurn, ...] = ()


class StoredTurns(Wire, frozen=True):
    """What a store has, as `StoredTurn.items`."""

    turns: tuple[bytes, ...]


class ResponseNames(Wire, frozen=True):
    names: tuple[str, ...]


ToApi = ApiSetup | Updates | Told | Stop

to_api: msgspec.msgpack.Decoder[ToApi] = msgspec.msgpack.Decoder(ToApi)

fleet_status_decoder: msgspec.msgpack.Decoder[FleetStatus] = msgspec.msgpack.Decoder(FleetStatus)

keep_response_decoder: msgspec.msgpack.Decoder[KeepResponse] = msgspec.msgpack.Decoder(KeepResponse)

stored_turns_decoder: msgspec.msgpack.Decoder[StoredTurns] = msgspec.msgpack.Decoder(StoredTurns)

response_names_decoder: msgspec.msgpack.Decoder[ResponseNames] = msgspec.msgpack.Decoder(ResponseNames)

operation_decoder: msgspec.msgpack.Decoder[Operation] = msgspec.msgpack.Decoder(Operation)
