"""Messages between a fleet and its front ends, and the status of a fleet."""

import msgspec

from shoal.wire.base import Stop, Wire
from shoal.wire.engine import ControlReply, EngineStats, Updates
from shoal.wire.plan import ApiSetup


class Operation(Wire, frozen=True):
    """An order of an operator to all replicas."""

    verb: str  # "pause", "resume", "sleep", "wake_up" or "reset_prefix_cache"
    mode: str = "abort"  # what happens to requests: "abort", "wait" (those that replicas have end first) or "keep"
    level: int = 1  # of a sleep: 0 (a pause), 1 or 2
    tags: tuple[str, ...] | None = None  # of a wake-up: the parts of memory to take again; None: all
    clear_cache: bool = True  # of a pause: the prefix cache is emptied, unless requests are kept
    running: bool = False  # of a `reset_prefix_cache`: running requests compute their blocks again too


class ReplicaStatus(Wire, frozen=True):
    """The state of a replica, as its supervisor sees it.

    `state` is one of "starting", "ready", "restarting" (it has ended and waits to be started again), "awaited" (another
    host starts it), "leaving" (it is being taken out) and "failed" (it is not started again).
    """

    number: int
    state: str
    host: str
    pid: int
    since_s: float  # seconds in this state
    restarts: int
    cause: str  # why it ended the last time, without its own name; "" if it never did
    held: int  # requests that it has
    stats: EngineStats | None  # the latest ones; counters are sums over all its starts


class FleetStatus(Wire, frozen=True):
    """The state of all replicas behind one address."""

    model: str
    tp: int  # tensor-parallel size of each replica
    pp: int  # pipeline-parallel size of each replica
    replicas: tuple[ReplicaStatus, ...]
    queued: int  # requests that no replica has yet
    replays: int  # how many times a request was continued elsewhere because its replica ended
    accepting: bool  # False: no new requests, as the fleet drains or has failed
    uptime_s: float
    failure: str = ""  # why the fleet has failed; "" if it has not
    max_model_len: int = 0  # the most tokens of a prompt and its output; 0: not known before a replica is ready
    activity: str = "awake"  # or "paused" or "asleep"
    sleep_level: int = 0
    missing: tuple[str, ...] = ()  # the parts of memory given back by a sleep: "weights", "kv_cache"


class StoredTurn(Wire, frozen=True):
    """A turn of a stored conversation: the items of one side, in order."""

    items: bytes  # a JSON list
    ids: tuple[str, ...]  # the ids of the items that have one


class StoreResponse(Wire, frozen=True):
    """A response to be stored."""

    id: str
    response: bytes  # in JSON
    said: StoredTurn  # the input that it answers
    answer: StoredTurn
    previous: str | None = None  # the id of the response that this conversation continues
    before: tuple[StoredTurn, ...] = ()  # all turns up to then, in case `previous` is no longer stored


class StoredTurns(Wire, frozen=True):
    """Some turns from the store. Each is a JSON list, as in `StoredTurn.items`."""

    turns: tuple[bytes, ...]


class ResponseNames(Wire, frozen=True):
    """The ids of stored items."""

    names: tuple[str, ...]


class ContextLength(Wire, frozen=True):
    """The most tokens that a prompt and its output may have together.

    A fleet sends it to each front end when its first replicas are ready and know the sizes of their KV caches, or when
    the front end connects if that is later.
    """

    max_model_len: int


ToApi = ApiSetup | Updates | ContextLength | ControlReply | Stop

to_api: msgspec.msgpack.Decoder[ToApi] = msgspec.msgpack.Decoder(ToApi)

fleet_status_decoder: msgspec.msgpack.Decoder[FleetStatus] = msgspec.msgpack.Decoder(FleetStatus)

store_response_decoder: msgspec.msgpack.Decoder[StoreResponse] = msgspec.msgpack.Decoder(StoreResponse)

stored_turns_decoder: msgspec.msgpack.Decoder[StoredTurns] = msgspec.msgpack.Decoder(StoredTurns)

response_names_decoder: msgspec.msgpack.Decoder[ResponseNames] = msgspec.msgpack.Decoder(ResponseNames)

operation_decoder: msgspec.msgpack.Decoder[Operation] = msgspec.msgpack.Decoder(Operation)
