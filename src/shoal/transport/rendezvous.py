"""The meeting place of processes on several hosts: they start in any order, authenticate, and exchange messages.

One process opens a `Rendezvous`, and one of its threads serves all others, which connect over TCP. The members of a
room wait until it is complete, post messages to each other, and are informed when a member leaves. There is also a
store of keys and values, through which groups of ranks find each other.

A process that joins proves that it knows the shared key (HMAC-SHA256 over a nonce of the other side; the key itself is
never sent). If the credentials name files for TLS, both sides first show a certificate of the cluster's CA, and
everything is encrypted. A process also sends its agreement: the versions, options and digests of the model that must be
equal for all. The first member of a room sets its agreement; a process whose agreement differs is refused, and the
answer names the difference.

A door is an entrance for processes that join one by one. They authenticate in the same way, but then the owner of the
door takes over their connection.
"""

import contextlib
import errno
import hashlib
import hmac
import os
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from shoal import addresses
from shoal.addresses import is_loopback, join_host_port
from shoal.errors import AddressInUse, ConfigError
from shoal.log import get_logger
from shoal.process.forks import close_in_children
from shoal.transport.channel import Channel, ChannelClosed, FrameTooLong, Socket, wait
from shoal.transport.tls import NotTls, TlsSocket, explain, server_socket, starts_tls
from shoal.wire.base import WireError, encode
from shoal.wire.credentials import NO_CREDENTIALS, Credentials
from shoal.wire.rendezvous import (
    Alive,
    Challenge,
    FromRendezvous,
    Hello,
    JoinRefused,
    Knock,
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

REPORT_S = 10.0  # how often the members of an incomplete room are told who is missing
HEARTBEAT_S = 3.0  # each side sends a message at least this often
HEARTBEAT_TIMEOUT_S = 20.0  # a connection without a message for this long is closed
_MAX_KNOCK_BYTES = 64
_MAX_HELLO_BYTES = 1 << 20
_MAX_FRAME_BYTES = 2**32 - 1
_POLL_S = 0.5
_FLUSH_S = 1.0
_PAUSE_S = 0.5  # before the next connection is accepted, when file descriptors have run out
_WARN_S = 10.0  # how often the log has the same line about a process that cannot join
_MAX_WARNINGS = 100  # different lines that are remembered for that
_SET_KEY = "set SHOAL_CLUSTER_KEY, or the content of SHOAL_CLUSTER_KEY_FILE, to the same secret on all hosts"
_USE_TLS = "it uses TLS: give --cluster-tls here too, with certificates of the same CA"
_NO_TLS = "it does not use TLS: give --cluster-tls to all hosts, or to none"
_UNREACHABLE_S = 8  # the kernel ends a connection whose host does not answer for this long
_KEEPALIVE = (
    (socket.TCP_KEEPIDLE, 2),
    (socket.TCP_KEEPINTVL, 2),
    (socket.TCP_KEEPCNT, _UNREACHABLE_S // 2 - 1),
    (socket.TCP_USER_TIMEOUT, _UNREACHABLE_S * 1000),
)


def proof(key: str, role: str, nonce: bytes, message: bytes) -> bytes:
    """Return the proof that `role` ("member" or "rendezvous") knows the key, for this nonce and this message."""
    return hmac.digest(key.encode(), role.encode() + nonce + message, hashlib.sha256)


def require_key(key: str, address: str) -> None:
    """Check that there is a key if other hosts can reach the address.

    Raises:
        ConfigError: there is none.
    """
    if not key and not is_loopback(address):
        raise ConfigError(f"other hosts can reach {address}, but there is no shared key: {_SET_KEY}")


def enable_keepalive(sock: socket.socket) -> None:
    """Have the kernel end a TCP connection to a host that has become unreachable."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


class Door(Protocol):
    """An entrance for processes that join one by one.

    The thread of the rendezvous calls both methods, so they must not block.
    """

    def objection(self, hello: Hello) -> JoinRefused | None:
        """Return why a process that knows the key may not enter, or None if it may.

        A process with a `failure` does not enter: it only reports this.
        """

    def enter(self, hello: Hello, channel: Channel) -> None:
        """Take over the connection of a process that was admitted."""


@dataclass(slots=True, eq=False)
class _Peer:
    """A connected process. `hello` is None until it has authenticated."""

    channel: Channel
    socket: Socket  # of the channel
    address: str
    nonce: bytes
    since: float
    last_received: float
    last_sent: float = 0.0
    challenged: bool = False
    hello: Hello | None = None
    pending_get: StoreGet | None = None
    room: "_Room | None" = None

    @property
    def name(self) -> str:
        assert self.hello is not None
        return f"rank {self.hello.rank} ({self.hello.host}, process {self.hello.pid})"


@dataclass(slots=True)
class _Room:
    size: int
    agreement: Mapping[str, str]
    created_by: str
    members: dict[int, _Peer] = field(default_factory=dict)
    complete: bool = False
    broken: bool = False  # it was complete, and a member has left
    last_report: float = field(default_factory=time.monotonic)


class Rendezvous:
    """The server of a rendezvous, which runs on a thread of its own from the start until `close`."""

    def __init__(
        self,
        address: str = "127.0.0.1",
        port: int = 0,
        *,
        credentials: Credentials = NO_CREDENTIALS,
        ports: tuple[int, int] | None = None,
        doors: Mapping[str, Door] | None = None,
        reopen_rooms: bool = False,
        max_unauthenticated: int = 256,
        hello_s: float = 10.0,
    ) -> None:
        """Start to listen.

        Args:
            port: 0 for a free one.
            ports: the first and the last port to choose from, if `port` is 0; None: any.
            credentials: what this process proves to those that join, and they to it.
            doors: by name. A Hello names a door in its field `room`.
            reopen_rooms: after a member has left a complete room, the next process that joins opens a new room of that
                name. Otherwise it is refused.
            max_unauthenticated: the most connections that have not authenticated yet; one more closes the oldest.
            hello_s: the seconds that a connection has to authenticate.

        Raises:
            ConfigError: this address or port cannot be used, or other hosts can reach it and there is no key.
        """
        self._credentials = credentials
        require_key(self._credentials.key, address)
        self._peers: dict[int, _Peer] = {}  # by file descriptor
        self._rooms: dict[str, _Room] = {}  # the latest room of each name
        self._doors = dict(doors or {})
        self._reopen_rooms = reopen_rooms
        self._max_unauthenticated = max_unauthenticated
        self._hello_s = hello_s
        self._formations = 0
        self._store: dict[str, bytes] = {}
        self._closing = threading.Event()
        self._accepts_again_at = 0.0
        self._warned_at: dict[str, float] = {}  # line of the log -> when it was written
        try:
            if ports is not None and not port:
                found = addresses.listen_within(address, range(ports[0], ports[1] + 1))
            else:
                found = addresses.listen(address, port)
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            kind = AddressInUse if taken else ConfigError
            hint = "choose another port" if taken else "give an address of this host"
            if taken and ports is not None and not port:
                hint = "give a larger --port-range"
            raise kind(f"can't listen on {join_host_port(address, port)} ({error.strerror}): {hint}") from None
        self._listeners = [_Listener(sock) for sock in found]
        close_in_children(self)
        self.address = join_host_port(address, found[0].getsockname()[1])
        self._thread = threading.Thread(target=self._serve, daemon=True, name="shoal-rendezvous")
        self._thread.start()

    @property
    def rooms(self) -> tuple[str, ...]:
        """The names of the rooms that have members."""
        return tuple(self._rooms)

    def close_in_child(self) -> None:
        """Close the listening sockets in a forked child, which would keep the port in use."""
        self._close_listeners()

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            listener.socket.close()

    def close(self) -> None:
        """Stop serving and close all connections. May be called again."""
        self._closing.set()
        self._thread.join(2 * _POLL_S)

    def __enter__(self) -> "Rendezvous":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self) -> None:
        try:
            while not self._closing.is_set():
                channels: list[Any] = [peer.channel for peer in self._peers.values()]
                if time.monotonic() >= self._accepts_again_at:
                    channels += self._listeners
                for channel in wait(channels, _POLL_S):
                    if isinstance(channel, _Listener):
                        self._accept(channel.socket)
                    elif channel.fileno() in self._peers:  # it may have been dropped in this round
                        self._read(self._peers[channel.fileno()])
                self._check_timeouts(time.monotonic())
        except Exception:
            log.exception("the rendezvous at %s has failed", self.address)
        finally:
            self._close_listeners()
            for peer in list(self._peers.values()):
                with contextlib.suppress(ChannelClosed):  # send it the last posts
                    peer.channel.flush(_FLUSH_S)
                peer.channel.close()

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, there = listener.accept()
        except BlockingIOError:  # the connection has ended already
            return
        except OSError as error:
            if error.errno in {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}:
                log.warning("no other process can join at %s for now: %s", self.address, error.strerror)
                self._accepts_again_at = time.monotonic() + _PAUSE_S
            return
        unauthenticated = [peer for peer in self._peers.values() if peer.hello is None]
        if len(unauthenticated) >= self._max_unauthenticated:
            self._drop(min(unauthenticated, key=lambda peer: peer.since), "")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        enable_keepalive(sock)
        connection: Socket = sock
        if self._credentials.tls is not None:
            try:
                connection = server_socket(sock, self._credentials.tls)
            except OSError as error:  # the connection has ended already, or the files were removed
                self._warn(str(there[0]), f"TLS has failed: {error}")
                sock.close()
                return
        now = time.monotonic()
        channel = Channel(connection, _MAX_KNOCK_BYTES)
        peer = _Peer(channel, connection, str(there[0]), secrets.token_bytes(32), now, now)
        self._peers[peer.channel.fileno()] = peer

    def _read(self, peer: _Peer) -> None:
        peer.last_received = time.monotonic()
        try:
            for frame in peer.channel.receive():
                if self._peers.get(peer.channel.fileno()) is not peer:
                    return
                self._answer(peer, to_rendezvous.decode(frame))
            if not peer.challenged and isinstance(peer.socket, TlsSocket) and peer.socket.is_open:
                self._challenge(peer)
        except ChannelClosed as ended:
            if isinstance(ended.__cause__, NotTls) and isinstance(peer.socket, TlsSocket):
                self._go_on_without_tls(peer, peer.socket)
                return
            if peer.hello is None:
                self._explain_end(peer, ended)
            self._drop(peer, "ended, or lost its connection")
        except WireError as error:
            self._drop(peer, f"sent a message that cannot be read: {error}")
        except Exception as error:  # the other peers must still be served
            who = "an unauthenticated process" if peer.hello is None else peer.name
            log.exception("the rendezvous at %s failed to answer %s", self.address, who)
            self._send(peer, JoinRefused(f"the request failed: {error}"))
            self._drop(peer, f"was removed: {error}")

    def _go_on_without_tls(self, peer: _Peer, encrypted: TlsSocket) -> None:
        """Listen to a process that does not use TLS: it may report why it cannot join. Otherwise it is refused."""
        del self._peers[peer.channel.fileno()]
        plain = encrypted.without_tls()
        peer.channel = Channel(plain, _MAX_KNOCK_BYTES)
        peer.socket = plain
        self._peers[peer.channel.fileno()] = peer
        self._read(peer)

    def _must_use_tls(self, peer: _Peer) -> bool:
        return self._credentials.tls is not None and not isinstance(peer.socket, TlsSocket)

    def _challenge(self, peer: _Peer) -> None:
        peer.challenged = True
        peer.channel.max_frame_bytes = _MAX_HELLO_BYTES
        self._send(peer, Challenge(peer.nonce))

    def _explain_end(self, peer: _Peer, ended: ChannelClosed) -> None:
        """Log and answer why a process cannot join, if one of both sides uses TLS and the other does not understand."""
        cause = ended.__cause__
        if isinstance(ended, FrameTooLong) and self._must_use_tls(peer):
            self._warn(peer.address, _NO_TLS)
        elif isinstance(cause, ssl.SSLError) and isinstance(peer.socket, TlsSocket):
            self._warn(peer.address, explain(cause))
            peer.socket.drop_unread()  # so that the other side reads the reason
        elif isinstance(ended, FrameTooLong) and starts_tls(ended.start):
            self._warn(peer.address, "it uses TLS, and this host does not: give --cluster-tls to all, or to none")
            self._send(peer, JoinRefused("it does not use TLS"))  # the other side sees at least that it is no TLS

    def _warn(self, who: str, why: str) -> None:
        """Log that a process cannot join. The same line is not repeated often, since anybody may connect."""
        line, now = f"a process at {who} cannot join at {self.address}: {why}", time.monotonic()
        if now - self._warned_at.get(line, -_WARN_S) < _WARN_S:
            return
        if len(self._warned_at) >= _MAX_WARNINGS:
            self._warned_at.clear()
        self._warned_at[line] = now
        log.warning("%s", line)

    def _answer(self, peer: _Peer, message: ToRendezvous) -> None:
        if peer.hello is None:
            self._authenticate(peer, message)
            return
        match message:
            case RoomMessage():
                self._forward(peer, message)
            case Leave():
                self._drop(peer, message.why)
            case StoreSet():
                old = self._store.get(message.key)
                if old is None or message.expected is None or message.expected == old:
                    self._store[message.key] = message.value
                self._send(peer, StoreValue(self._store[message.key]))
                self._serve_waiting()
            case StoreAdd():
                old = self._store.get(message.key, b"0")
                try:
                    total = int(old) + message.amount
                except ValueError:
                    raise ValueError(f"can't add a number to {message.key}, which is {old[:40]!r}") from None
                self._store[message.key] = str(total).encode()
                self._send(peer, StoreValue(self._store[message.key]))
                self._serve_waiting()
            case StoreDelete():
                self._send(peer, StoreValue(self._store.pop(message.key, None)))
            case StoreGet():
                peer.pending_get = message
                self._serve_waiting()

    def _authenticate(self, peer: _Peer, message: ToRendezvous) -> None:
        match message:
            case Knock() if not peer.challenged:
                if self._must_use_tls(peer) and not message.only_to_report:
                    self._warn(peer.address, _NO_TLS)
                    self._refuse(peer, JoinRefused(_USE_TLS))
                else:
                    self._challenge(peer)
            case Signed():
                self._welcome(peer, message)
            case _:
                self._drop(peer, "")

    def _serve_waiting(self) -> None:
        for peer in list(self._peers.values()):
            asked = peer.pending_get
            if asked is None:
                continue
            there = all(key in self._store for key in asked.keys)
            if there or not asked.wait:
                peer.pending_get = None
                self._send(peer, StoreValue(self._store[asked.keys[-1]] if there else None))

    def _welcome(self, peer: _Peer, signed: Signed) -> None:
        if not hmac.compare_digest(signed.proof, proof(self._credentials.key, "member", peer.nonce, signed.hello)):
            self._warn(peer.address, f"the shared key differs: {_SET_KEY}")
            self._refuse(peer, JoinRefused(f"the shared key differs: {_SET_KEY}"))
            return
        hello = hello_decoder.decode(signed.hello)
        if self._must_use_tls(peer) and not hello.failure:
            self._refuse(peer, JoinRefused(_USE_TLS))
            return
        door = self._doors.get(hello.room) if hello.size else None
        refused = self._objection(hello) if door is None else door.objection(hello)
        if refused is None and hello.failure:
            refused = JoinRefused(hello.failure)
        if refused is not None:
            self._refuse(peer, refused)
            return
        peer.hello = hello
        peer.channel.max_frame_bytes = _MAX_FRAME_BYTES
        self._send(peer, Welcome(proof(self._credentials.key, "rendezvous", hello.nonce, signed.hello)))
        if door is not None:
            del self._peers[peer.channel.fileno()]
            door.enter(hello, peer.channel)
        elif hello.size:
            self._enter(peer, hello)

    def _objection(self, hello: Hello) -> JoinRefused | None:
        """Return why a process may not join its room, or None if it may."""
        room = self._room_of(hello)
        if not hello.size or room is None:
            there = 0 <= hello.rank < max(hello.size, 1)
            return None if there else JoinRefused(f"rank {hello.rank} of {hello.size} does not exist")
        if hello.size != room.size:
            return JoinRefused(f"it expects {hello.size} ranks, {room.created_by} expects {room.size}")
        if not 0 <= hello.rank < room.size:
            return JoinRefused(f"rank {hello.rank} of {room.size} does not exist")
        if hello.rank in room.members:
            why = f"{room.members[hello.rank].name} has already joined: give every process a rank of its own"
            # That member may have ended or become unreachable without the rendezvous knowing it yet.
            return JoinRefused(why, again=self._reopen_rooms)
        if room.complete:  # the member with this rank has left, and the others do not know the new process
            return JoinRefused(f"the others have gone on without rank {hello.rank}: restart all of them")
        why = describe_difference(hello.agreement, room.agreement, room.created_by)
        return JoinRefused(why) if why else None

    def _room_of(self, hello: Hello) -> _Room | None:
        """Return the room that a process would join, or None if it would open a new one."""
        room = self._rooms.get(hello.room)
        return None if room is None or (room.broken and self._reopen_rooms) else room

    def _enter(self, peer: _Peer, hello: Hello) -> None:
        room = self._room_of(hello)
        if room is None:
            room = self._rooms[hello.room] = _Room(hello.size, hello.agreement, peer.name)
        room.members[hello.rank] = peer
        peer.room = room
        if len(room.members) == room.size:
            room.complete = True
            names = tuple(room.members[rank].name for rank in range(room.size))
            for member in list(room.members.values()):
                self._send(member, RoomComplete(names, self._formations))
            self._formations += 1
        else:
            self._report_missing(room)

    def _forward(self, sender: _Peer, message: RoomMessage) -> None:
        if sender.hello is None or sender.room is None:
            return
        own = sender.hello.rank
        for rank, member in list(sender.room.members.items()):
            if rank != own and message.to in (-1, rank):
                self._send(member, RoomMessage(message.topic, own, message.to, message.payload))

    def _report_missing(self, room: _Room) -> None:
        room.last_report = time.monotonic()
        arrived = tuple(room.members[rank].name for rank in sorted(room.members))
        missing = tuple(rank for rank in range(room.size) if rank not in room.members)
        for member in list(room.members.values()):
            self._send(member, RoomWaiting(arrived, missing))

    def _check_timeouts(self, now: float) -> None:
        for room in list(self._rooms.values()):
            if not room.complete and now - room.last_report >= REPORT_S:
                self._report_missing(room)
        for peer in list(self._peers.values()):
            if peer.hello is not None and peer.hello.size and now - peer.last_sent > HEARTBEAT_S:
                self._send(peer, Alive())
            if peer.hello is None and now - peer.since > self._hello_s:
                self._drop(peer, "")
            elif peer.hello is not None and peer.hello.size and now - peer.last_received > HEARTBEAT_TIMEOUT_S:
                self._drop(peer, f"sent nothing for {now - peer.last_received:.0f} s")

    def _refuse(self, peer: _Peer, refused: JoinRefused) -> None:
        self._send(peer, refused)
        peer.channel.flush(0)
        peer.hello = None
        self._drop(peer, "")

    def _drop(self, peer: _Peer, why: str) -> None:
        """Close a connection, and inform the other members of its room."""
        if self._peers.pop(peer.channel.fileno(), None) is None:
            return
        peer.channel.close()
        hello, room = peer.hello, peer.room
        if hello is None or room is None:
            return
        del room.members[hello.rank]
        room.broken = room.complete
        if not room.members and self._rooms.get(hello.room) is room:
            del self._rooms[hello.room]
        if room.complete:
            for member in list(room.members.values()):
                self._send(member, MemberGone(hello.rank, f"{peer.name} {why}" if why else ""))

    def _send(self, peer: _Peer, message: FromRendezvous) -> None:
        peer.last_sent = time.monotonic()
        with contextlib.suppress(ChannelClosed):  # `_read` will notice it and drop the peer
            peer.channel.send(encode(message))


class _Listener:
    """A listening socket, in a form that `channel.wait` can wait for."""

    backlog = False

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket = sock

    def fileno(self) -> int:
        return self.socket.fileno()


def describe_difference(found: Mapping[str, str], wanted: Mapping[str, str], whose: str) -> str:
    """Return how an agreement differs from the one of `whose`, which counts, or "" if it does not."""
    for name in sorted({*found, *wanted}):
        mine, theirs = found.get(name, "nothing"), wanted.get(name, "nothing")
        if mine != theirs:
            return f"its {name} is {mine}, that of {whose} is {theirs}: start all with the same"
    return ""


def this_process() -> tuple[str, int]:
    return socket.gethostname(), os.getpid()
