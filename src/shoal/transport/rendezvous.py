"""Where replicas and hosts meet: any order of start, an authenticated hello, and a post office for those who are in.

One process opens a `Rendezvous`; a thread of it serves everybody who joins over TCP. Members of a room learn that it is
complete, post messages to each other, and are told when one of them has gone. Beside the rooms there is a store of keys
and values, in which groups of ranks find each other.

Whoever joins proves that it knows the shared key (HMAC-SHA256 over a nonce of the other side; the key itself never
travels), and brings what must be the same for all: versions, options, digests of the model. Who differs is refused, and
told in what. The first member of a room sets what it is.

Beside rooms there may be doors: who is let in there has proved the same, and its connection belongs to whoever has put
up the door.
"""

import contextlib
import errno
import hashlib
import hmac
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from shoal import addresses
from shoal.addresses import is_loopback, joined
from shoal.errors import AddressInUse, ConfigError
from shoal.log import get_logger
from shoal.process.forks import let_go_in_children
from shoal.transport.channel import Channel, ChannelClosed, wait
from shoal.wire.base import WireError, encode
from shoal.wire.rendezvous import (
    Alive,
    Challenge,
    FromRendezvous,
    Hello,
    JoinRefused,
    Leave,
    MemberGone,
    RoomComplete,
    RoomMessage,
    RoomWaiting,
    Signed,
    StoreAdd,
    StoreDelete,
    StoreGet,
    StoreSet,
    StoreValue,
    ToRendezvous,
    Welcome,
    hello_decoder,
    to_rendezvous,
)

log = get_logger("rendezvous")

SAY_S = 10.0  # how often those who wait are told for whom
ALIVE_S = 3.0  # how often each side says something
QUIET_S = 20.0  # whoever says nothing for so long has gone
_LONGEST_HELLO = 1 << 20
_LONGEST = 2**32 - 1
_SLICE_S = 0.5
_FLUSH_S = 1.0
_PAUSE_S = 0.5  # without file descriptors, before the next connection is accepted
_SET_KEY = "set SHOAL_CLUSTER_KEY, or what the file of SHOAL_CLUSTER_KEY_FILE holds, to the same secret on all hosts"
_CUT_OFF_S = 8  # without a sign of the other host: its connections have ended
_KEEPALIVE = (
    (socket.TCP_KEEPIDLE, 2),
    (socket.TCP_KEEPINTVL, 2),
    (socket.TCP_KEEPCNT, _CUT_OFF_S // 2 - 1),
    (socket.TCP_USER_TIMEOUT, _CUT_OFF_S * 1000),
)


def proof(key: str, role: str, nonce: bytes, said: bytes) -> bytes:
    """That `role` ("member" or "rendezvous") knows the key, for this nonce and what it says with it."""
    return hmac.digest(key.encode(), role.encode() + nonce + said, hashlib.sha256)


def require_key(key: str, address: str) -> None:
    """Raises:
    ConfigError: the address is one that other hosts reach, and there is no key.
    """
    if not key and not is_loopback(address):
        raise ConfigError(f"{address} is reached from other hosts, and there is no shared key: {_SET_KEY}")


def watch_host(sock: socket.socket) -> None:
    """Has the kernel end a TCP connection to a host that was cut off, which says no goodbye."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


class Door(Protocol):
    """Both are called on the rendezvous' thread, and must not block."""

    def objection(self, hello: Hello) -> JoinRefused | None:
        """Why somebody who knows the key may not come in."""

    def enter(self, hello: Hello, channel: Channel) -> None:
        """Takes over the connection of somebody who has been welcomed."""


@dataclass(slots=True, eq=False)
class _Guest:
    """A connection. `hello` is None before it has said who it is."""

    channel: Channel
    nonce: bytes
    since: float
    heard: float
    said: float = 0.0
    hello: Hello | None = None
    waits_for: StoreGet | None = None
    room: "_Room | None" = None

    @property
    def name(self) -> str:
        assert self.hello is not None
        return f"rank {self.hello.rank} ({self.hello.host}, process {self.hello.pid})"


@dataclass(slots=True)
class _Room:
    size: int
    agreement: Mapping[str, str]
    set_by: str
    members: dict[int, _Guest] = field(default_factory=dict)
    complete: bool = False
    broken: bool = False  # it was complete, and somebody has gone
    said: float = field(default_factory=time.monotonic)


class Rendezvous:
    def __init__(
        self,
        address: str = "127.0.0.1",
        port: int = 0,
        *,
        key: str = "",
        doors: Mapping[str, Door] | None = None,
        renewing: bool = False,
        most_strangers: int = 256,
        hello_s: float = 10.0,
    ) -> None:
        """Listens at once. Port 0 takes a free one. `doors`: by the names that a Hello has for its room. `renewing`:
        when somebody has gone from a room, the next who comes begins a new one of that name; else it is refused.

        Whoever connects has `hello_s` seconds to say who it is. Of connections that have not said it yet, there are no
        more than `most_strangers`: the oldest is closed for the next one.

        Raises:
            ConfigError: the address can't be listened on, or others reach it and there is no key.
        """
        require_key(key, address)
        self._key = key
        self._guests: dict[int, _Guest] = {}  # by file descriptor
        self._rooms: dict[str, _Room] = {}  # of each name the latest
        self._doors = dict(doors or {})
        self._renewing = renewing
        self._most_strangers = most_strangers
        self._hello_s = hello_s
        self._formations = 0
        self._store: dict[str, bytes] = {}
        self._closing = threading.Event()
        self._accepts_from = 0.0
        try:
            found = addresses.listen(address, port)
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            kind = AddressInUse if taken else ConfigError
            hint = "choose another port" if taken else "give an address of this host"
            raise kind(f"can't listen on {joined(address, port)} ({error.strerror}): {hint}") from None
        self._listeners = [_Listener(sock) for sock in found]
        let_go_in_children(self)
        self.address = joined(address, found[0].getsockname()[1])
        self._thread = threading.Thread(target=self._serve, daemon=True, name="shoal-rendezvous")
        self._thread.start()

    @property
    def rooms(self) -> tuple[str, ...]:
        """The names of the rooms in which somebody is."""
        return tuple(self._rooms)

    def let_go(self) -> None:
        """In a forked child, which would keep the port taken."""
        self._close_listeners()

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            listener.socket.close()

    def close(self) -> None:
        """Idempotent."""
        self._closing.set()
        self._thread.join(2 * _SLICE_S)

    def __enter__(self) -> "Rendezvous":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self) -> None:
        try:
            while not self._closing.is_set():
                channels: list[Any] = [guest.channel for guest in self._guests.values()]
                if time.monotonic() >= self._accepts_from:
                    channels += self._listeners
                for channel in wait(channels, _SLICE_S):
                    if isinstance(channel, _Listener):
                        self._accept(channel.socket)
                    elif channel.fileno() in self._guests:  # it may just have been shown the door
                        self._listen_to(self._guests[channel.fileno()])
                self._look_around(time.monotonic())
        except Exception:
            log.exception("the rendezvous at %s has failed", self.address)
        finally:
            self._close_listeners()
            for guest in list(self._guests.values()):
                with contextlib.suppress(ChannelClosed):  # what was posted last is still to reach it
                    guest.channel.flush(_FLUSH_S)
                guest.channel.close()

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except BlockingIOError:  # it has gone already
            return
        except OSError as error:
            if error.errno in {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}:
                log.warning("nobody else can join at %s for now: %s", self.address, error.strerror)
                self._accepts_from = time.monotonic() + _PAUSE_S
            return
        strangers = [guest for guest in self._guests.values() if guest.hello is None]
        if len(strangers) >= self._most_strangers:
            self._part(min(strangers, key=lambda guest: guest.since), "")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        watch_host(sock)
        now = time.monotonic()
        guest = _Guest(Channel(sock, _LONGEST_HELLO), secrets.token_bytes(32), now, now)
        self._guests[guest.channel.fileno()] = guest
        self._send(guest, Challenge(guest.nonce))

    def _listen_to(self, guest: _Guest) -> None:
        guest.heard = time.monotonic()
        try:
            for frame in guest.channel.receive():
                if self._guests.get(guest.channel.fileno()) is not guest:
                    return
                self._answer(guest, to_rendezvous.decode(frame))
        except ChannelClosed:
            self._part(guest, "ended, or lost its connection")
        except WireError as error:
            self._part(guest, f"sent what nobody understands: {error}")
        except Exception as error:  # the others are still to be served
            who = "a stranger" if guest.hello is None else guest.name
            log.exception("what %s asks for at %s can't be done", who, self.address)
            self._send(guest, JoinRefused(f"it can't be done: {error}"))
            self._part(guest, f"was shown out: {error}")

    def _answer(self, guest: _Guest, message: ToRendezvous) -> None:
        if guest.hello is None:
            if not isinstance(message, Signed):
                self._part(guest, "")
                return
            self._welcome(guest, message)
            return
        match message:
            case RoomMessage():
                self._forward(guest, message)
            case Leave():
                self._part(guest, message.why)
            case StoreSet():
                old = self._store.get(message.key)
                if old is None or message.expected is None or message.expected == old:
                    self._store[message.key] = message.value
                self._send(guest, StoreValue(self._store[message.key]))
                self._serve_waiting()
            case StoreAdd():
                old = self._store.get(message.key, b"0")
                try:
                    total = int(old) + message.amount
                except ValueError:
                    raise ValueError(f"{message.key} is {old[:40]!r}, to which no number can be added") from None
                self._store[message.key] = str(total).encode()
                self._send(guest, StoreValue(self._store[message.key]))
                self._serve_waiting()
            case StoreDelete():
                self._send(guest, StoreValue(self._store.pop(message.key, None)))
            case StoreGet():
                guest.waits_for = message
                self._serve_waiting()

    def _serve_waiting(self) -> None:
        for guest in list(self._guests.values()):
            asked = guest.waits_for
            if asked is None:
                continue
            there = all(key in self._store for key in asked.keys)
            if there or not asked.wait:
                guest.waits_for = None
                self._send(guest, StoreValue(self._store[asked.keys[-1]] if there else None))

    def _welcome(self, guest: _Guest, signed: Signed) -> None:
        if not hmac.compare_digest(signed.proof, proof(self._key, "member", guest.nonce, signed.hello)):
            self._refuse(guest, JoinRefused(f"the shared key is another one: {_SET_KEY}"))
            return
        hello = hello_decoder.decode(signed.hello)
        door = self._doors.get(hello.room) if hello.size else None
        refused = self._objection(hello) if door is None else door.objection(hello)
        if refused is not None:
            self._refuse(guest, refused)
            return
        guest.hello = hello
        guest.channel.longest = _LONGEST
        self._send(guest, Welcome(proof(self._key, "rendezvous", hello.nonce, signed.hello)))
        if door is not None:
            del self._guests[guest.channel.fileno()]
            door.enter(hello, guest.channel)
        elif hello.size:
            self._enter(guest, hello)

    def _objection(self, hello: Hello) -> JoinRefused | None:
        """Why somebody may not join a room."""
        room = self._room_of(hello)
        if not hello.size or room is None:
            there = 0 <= hello.rank < max(hello.size, 1)
            return None if there else JoinRefused(f"rank {hello.rank} of {hello.size} does not exist")
        if hello.size != room.size:
            return JoinRefused(f"it counts {hello.size} ranks, {room.set_by} counts {room.size}")
        if not 0 <= hello.rank < room.size:
            return JoinRefused(f"rank {hello.rank} of {room.size} does not exist")
        if hello.rank in room.members:
            why = f"{room.members[hello.rank].name} is there already: give every process a rank of its own"
            # It may have ended, or been cut off, and its end not be known here yet.
            return JoinRefused(why, again=self._renewing)
        if room.complete:  # one that was there before has gone, and this one is new to the others
            return JoinRefused(f"the others have gone on without rank {hello.rank}: start all of them anew")
        why = difference(hello.agreement, room.agreement, room.set_by)
        return JoinRefused(why) if why else None

    def _room_of(self, hello: Hello) -> _Room | None:
        """The one that a newcomer enters, if it is there already."""
        room = self._rooms.get(hello.room)
        return None if room is None or (room.broken and self._renewing) else room

    def _enter(self, guest: _Guest, hello: Hello) -> None:
        room = self._room_of(hello)
        if room is None:
            room = self._rooms[hello.room] = _Room(hello.size, hello.agreement, guest.name)
        room.members[hello.rank] = guest
        guest.room = room
        if len(room.members) == room.size:
            room.complete = True
            names = tuple(room.members[rank].name for rank in range(room.size))
            for member in list(room.members.values()):
                self._send(member, RoomComplete(names, self._formations))
            self._formations += 1
        else:
            self._say_who_is_missing(room)

    def _forward(self, sender: _Guest, message: RoomMessage) -> None:
        if sender.hello is None or sender.room is None:
            return
        own = sender.hello.rank
        for rank, member in list(sender.room.members.items()):
            if rank != own and message.to in (-1, rank):
                self._send(member, RoomMessage(message.topic, own, message.to, message.payload))

    def _say_who_is_missing(self, room: _Room) -> None:
        room.said = time.monotonic()
        arrived = tuple(room.members[rank].name for rank in sorted(room.members))
        missing = tuple(rank for rank in range(room.size) if rank not in room.members)
        for member in list(room.members.values()):
            self._send(member, RoomWaiting(arrived, missing))

    def _look_around(self, now: float) -> None:
        for room in list(self._rooms.values()):
            if not room.complete and now - room.said >= SAY_S:
                self._say_who_is_missing(room)
        for guest in list(self._guests.values()):
            if guest.hello is not None and guest.hello.size and now - guest.said > ALIVE_S:
                self._send(guest, Alive())
            if guest.hello is None and now - guest.since > self._hello_s:
                self._part(guest, "")
            elif guest.hello is not None and guest.hello.size and now - guest.heard > QUIET_S:
                self._part(guest, f"was not heard from for {now - guest.heard:.0f} s")

    def _refuse(self, guest: _Guest, refused: JoinRefused) -> None:
        self._send(guest, refused)
        guest.channel.flush(0)
        guest.hello = None
        self._part(guest, "")

    def _part(self, guest: _Guest, why: str) -> None:
        """Lets somebody go, and tells the others of its room."""
        if self._guests.pop(guest.channel.fileno(), None) is None:
            return
        guest.channel.close()
        hello, room = guest.hello, guest.room
        if hello is None or room is None:
            return
        del room.members[hello.rank]
        room.broken = room.complete
        if not room.members and self._rooms.get(hello.room) is room:
            del self._rooms[hello.room]
        if room.complete:
            for member in list(room.members.values()):
                self._send(member, MemberGone(hello.rank, f"{guest.name} {why}" if why else ""))

    def _send(self, guest: _Guest, message: FromRendezvous) -> None:
        guest.said = time.monotonic()
        with contextlib.suppress(ChannelClosed):  # its end is read, and said, in turn
            guest.channel.send(encode(message))


class _Listener:
    """A listening socket among the channels that are waited for."""

    backlog = False

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket = sock

    def fileno(self) -> int:
        return self.socket.fileno()


def difference(found: Mapping[str, str], wanted: Mapping[str, str], whose: str) -> str:
    """In what somebody's agreement differs from the one that counts; "" if in nothing."""
    for name in sorted({*found, *wanted}):
        mine, theirs = found.get(name, "nothing"), wanted.get(name, "nothing")
        if mine != theirs:
            return f"its {name} is {mine}, that of {whose} is {theirs}: start all with the same"
    return ""


def this_process() -> tuple[str, int]:
    return socket.gethostname(), os.getpid()
