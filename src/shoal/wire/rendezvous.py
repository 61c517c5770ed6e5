"""Messages of a rendezvous, where processes of several hosts meet."""

import msgspec

from shoal.wire.base import Ids, Wire

# The names of doors. A process that wants to enter through a door gives the name as the `room` in its Hello.
FRONT_END_DOOR = "front end"
PEERS_DOOR = "peers"
NODES_DOOR = "nodes"


class Knock(Wire, frozen=True):
    """The first message of a process that connects without TLS, so that a rendezvous with TLS sees it at once."""

    only_to_report: bool = False  # True: it only reports why it cannot join, which it may do without TLS


class Challenge(Wire, frozen=True):
    """The first message of a rendezvous, after a Knock or after the handshake of TLS.

    The process signs its Hello with the nonce.
    """

    nonce: bytes


class Hello(Wire, frozen=True):
    """The introduction of a process: the room that it wants to join, its place there, and its agreement.

    With a size of 0 the process joins no room, and only uses the store of keys and values.
    """

    room: str
    rank: int  # its number among the members of the room
    size: int  # how many members the room has when it is complete
    host: str
    pid: int
    nonce: bytes  # signed by the rendezvous in its Welcome
    agreement: dict[str, str]  # what all members must have in common (`launch.agreement`): name -> value or digest
    # An encoded `HostReport`, for the door of a front end. It is decoded after the versions were compared.
    report: bytes = b""
    failure: str = ""  # why the process cannot join; it only wants the owner of the door to know this


class Signed(Wire, frozen=True):
    """An encoded Hello, with the proof that its sender knows the shared key."""

    hello: bytes
    proof: bytes


class Welcome(Wire, frozen=True):
    """The acceptance of a process, with the proof that the rendezvous knows the shared key too."""

    proof: bytes


class JoinRefused(Wire, frozen=True):
    """The refusal of a process that wanted to join. The rendezvous then closes the connection."""

    why: str
    again: bool = False  # True: the process should try again, as the obstacle may be gone soon


class RoomWaiting(Wire, frozen=True):
    """A note to the members of a room that it is not complete yet."""

    arrived: tuple[str, ...]  # the members that are there
    missing: Ids  # the numbers of those that are not


class RoomComplete(Wire, frozen=True):
    """A note to the members of a room that it is complete."""

    members: tuple[str, ...]  # a description of each, by rank
    formation: int = 0  # how many rooms were completed before this one


class RoomMessage(Wire, frozen=True):
    """A message from one member of a room to another, or to all others."""

    topic: str
    sender: int
    to: int  # -1: all others
    payload: bytes


class MemberGone(Wire, frozen=True):
    """A note that a member has left a complete room."""

    rank: int
    why: str  # empty if it had finished its work


class Leave(Wire, frozen=True):
    """The goodbye of a member."""

    why: str = ""  # empty if it has finished its work


class Alive(Wire, frozen=True):
    """A heartbeat, which both sides send."""


class StoreSet(Wire, frozen=True):
    """An order to set a key of the store. The answer is a StoreValue with the key's value afterwards."""

    key: str
    value: bytes
    expected: bytes | None = None  # if the key exists, it is set only if it has this value; None: it is set always


class StoreAdd(Wire, frozen=True):
    """An order to add to a number in the store; a missing key counts as 0. The answer is a StoreValue with the sum."""

    key: str
    amount: int


class StoreGet(Wire, frozen=True):
    """A question for the value of the last of some keys. The answer is a StoreValue.

    With `wait`, the answer comes when all keys exist. Otherwise it comes at once, and is None if a key is missing.
    """

    keys: tuple[str, ...]
    wait: bool


class StoreDelete(Wire, frozen=True):
    """An order to delete a key. The answer is a StoreValue with the value that the key had."""

    key: str


class StoreValue(Wire, frozen=True):
    """The answer of the store."""

    value: bytes | None  # None: there is no such key


ToRendezvous = Knock | Signed | RoomMessage | Leave | Alive | StoreSet | StoreAdd | StoreGet | StoreDelete

FromRendezvous = (
    Challenge | Welcome | JoinRefused | RoomWaiting | RoomComplete | RoomMessage | MemberGone | Alive | StoreValue
)

to_rendezvous: msgspec.msgpack.Decoder[ToRendezvous] = msgspec.msgpack.Decoder(ToRendezvous)

from_rendezvous: msgspec.msgpack.Decoder[FromRendezvous] = msgspec.msgpack.Decoder(FromRendezvous)

hello_decoder: msgspec.msgpack.Decoder[Hello] = msgspec.msgpack.Decoder(Hello)
