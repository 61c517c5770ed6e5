"""Messages of a rendezvous, where processes of several hosts meet."""

import msgspec

from shoal.wire.base import Ids, Wire


class Challenge(Wire, frozen=True):
    """The first word of a rendezvous to whoever connects."""

    nonce: bytes


class Hello(Wire, frozen=True):
    """Who joins which room, and what must be the same for all in it. A room that has no size is only asked."""

    room: str
    rank: int
    size: int
    host: str
    pid: int
    nonce: bytes
    agreement: dict[str, str]  # name of a version, an option, a part of the model -> value or digest


class Signed(Wire, frozen=True):
    """A Hello, and the proof that its sender knows the shared key."""

    hello: bytes
    proof: bytes


class Welcome(Wire, frozen=True):
    """The rendezvous knows the key too."""

    proof: bytes


class JoinRefused(Wire, frozen=True):
    why: str
    again: bool = False  # it may be over soon


class RoomWaiting(Wire, frozen=True):
    """A room is not complete yet."""

    arrived: tuple[str, ...]
    missing: Ids


class RoomComplete(Wire, frozen=True):
    """A room is complete. `members`: who they are, by rank; `formation`: how many rooms were complete before it."""

    members: tuple[str, ...]
    formation: int = 0


class Posted(Wire, frozen=True):
    """From one member to another, or to all others."""

    topic: str
    sender: int
    to: int  # -1: all others
    payload: bytes


class MemberGone(Wire, frozen=True):
    """A member has left a room that was complete. `why` is empty if it had ended its work."""

    rank: int
    why: str


class Leave(Wire, frozen=True):
    why: str = ""


class Alive(Wire, frozen=True):
    pass


class StoreSet(Wire, frozen=True):
    """Answered, like all that is said to the store, by a StoreValue. Not set if the key is there and `expected` is
    another value."""

    key: str
    value: bytes
    expected: bytes | None = None


class StoreAdd(Wire, frozen=True):
    key: str
    amount: int


class StoreGet(Wire, frozen=True):
    """The value of the last key, once all are there; if it shall not `wait`, nothing while one is missing."""

    keys: tuple[str, ...]
    wait: bool


class StoreDelete(Wire, frozen=True):
    key: str


class StoreValue(Wire, frozen=True):
    value: bytes | None


ToRendezvous = Signed | Posted | Leave | Alive | StoreSet | StoreAdd | StoreGet | StoreDelete

FromRendezvous = (
    Challenge | Welcome | JoinRefused | RoomWaiting | RoomComplete | Posted | MemberGone | Alive | StoreValue
)

to_rendezvous: msgspec.msgpack.Decoder[ToRendezvous] = msgspec.msgpack.Decoder(ToRendezvous)

from_rendezvous: msgspec.msgpack.Decoder[FromRendezvous] = msgspec.msgpack.Decoder(FromRendezvous)

hello_decoder: msgspec.msgpack.Decoder[Hello] = msgspec.msgpack.Decoder(Hello)
