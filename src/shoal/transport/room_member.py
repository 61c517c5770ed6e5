"""A member of a room at a rendezvous: it joins, and exchanges messages with the other members."""

import contextlib
import hmac
import os
import secrets
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from shoal import addresses
from shoal.addresses import Address
from shoal.errors import ConfigError, EngineError, ShoalError
from shoal.log import get_logger
from shoal.transport.channel import Channel, ChannelClosed, wait
from shoal.transport.rendezvous import (
    HEARTBEAT_S,
    HEARTBEAT_TIMEOUT_S,
    REPORT_S,
    enable_keepalive,
    proof,
    require_key,
    this_process,
)
from shoal.transport.tls import NotTls, TlsSocket, client_socket, explain
from shoal.wire.base import WireError, encode
from shoal.wire.credentials import Credentials, TlsFiles
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
    Welcome,
    from_rendezvous,
)

log = get_logger("rendezvous")

_RETRY_S = 0.2
_REPORT_RETURNING_S = 60.0  # how often a process that returns logs what it waits for
_ATTEMPT_S = 2.0
_ENDED = (ssl.SSLEOFError, ssl.SSLZeroReturnError)  # the other side has closed the connection
REFUSED_TIMEOUT_S = 15.0  # the wait for an unreachable member with the same rank to be removed


class _ConnectionEnded(Exception):
    """The other side ended the connection before it accepted or refused."""


class _NoAnswer(Exception):
    """The other side accepted the connection but sends nothing."""


class _FilesUnusable(Exception):
    """The files for TLS cannot be used now. Somebody may be replacing them."""


class _RefusedForNow(Exception):
    pass


def connect(
    address: Address,
    credentials: Credentials,
    *,
    room: str = "",
    rank: int = 0,
    size: int = 0,
    agreement: Mapping[str, str] | None = None,
    report: bytes = b"",
    timeout: float,
    returning: bool = False,
    cancelled: Callable[[], bool] = lambda: False,
) -> Channel:
    """Connect to a rendezvous, and return the connection after both sides have proved that they know the key.

    If the credentials name files for TLS, both sides have also shown their certificates.

    The rendezvous may open later than this call, or may be so busy that it closes the connection: this is tried again.

    Args:
        room: the name of a room or of a door.
        size: of the room; 0 to join none.
        returning: this process has joined before, so its address and rank are right.
        cancelled: is asked before each attempt whether to give up.

    Raises:
        ConfigError: the rendezvous refuses this process, and says why; or it cannot be reached in time.
        EngineError: with `returning`, the rendezvous cannot be reached in time, or does not admit this process in time;
            or the attempts were cancelled.
    """
    require_key(credentials.key, address.host)
    host, pid = this_process()
    hello = Hello(room, rank, size, host, pid, secrets.token_bytes(32), dict(agreement or {}), report)
    begun = time.monotonic()
    last_report = begun
    refused_since: float | None = None
    timeout_error = EngineError if returning else ConfigError
    while True:
        left = timeout - (time.monotonic() - begun)
        if cancelled():
            raise EngineError(f"gave up waiting for {address}")
        try:
            sock = addresses.connect(address, max(min(left, _ATTEMPT_S), 0.01))
            left = max(timeout - (time.monotonic() - begun), _ATTEMPT_S)
            return _authenticated(sock, hello, address, credentials, left)
        except OSError as error:
            why = error.strerror or str(error)
            final = (
                f"no answer from {address} within {timeout:g} s ({why}), and no process has joined: start rank 0 "
                "there, or give the address and port at which it listens"
            )
            refused_since = None
        except _NoAnswer:
            why = "it does not answer"
            final = f"{address} did not answer in time: is another program there?"
            refused_since = None
        except _ConnectionEnded:
            refused_since = None
            why = "it closes the connection"
            final = f"{address} closed every connection for {timeout:g} s: is another program there?"
        except _FilesUnusable as error:
            refused_since = None
            why = final = f"the files of --cluster-tls can't be used: {error}"
        except _RefusedForNow as error:
            refused_since = time.monotonic() if refused_since is None else refused_since
            why = final = str(error)
            if time.monotonic() - refused_since > REFUSED_TIMEOUT_S and not returning:
                raise ConfigError(final) from None
        if time.monotonic() - begun + _RETRY_S >= timeout:
            raise timeout_error(final)
        if time.monotonic() - last_report >= (_REPORT_RETURNING_S if returning else REPORT_S):
            last_report = time.monotonic()
            log.info("waiting for %s (%s), %.0f s of %g", address, why, last_report - begun, timeout)
        time.sleep(_RETRY_S)


def _authenticated(
    sock: socket.socket, hello: Hello, address: Address, credentials: Credentials, timeout: float
) -> Channel:
    """Return a channel on this socket after authentication. If that fails, the socket is closed."""
    deadline = time.monotonic() + timeout
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    enable_keepalive(sock)
    if credentials.tls is None:
        channel = Channel(sock)
    else:
        channel = Channel(_encrypted(sock, credentials.tls, address, deadline))
    try:
        _authenticate(channel, hello, address, credentials.key, deadline, encrypted=credentials.tls is not None)
    except BaseException:
        channel.close()
        raise
    return channel


def _encrypted(sock: socket.socket, files: TlsFiles, address: Address, deadline: float) -> TlsSocket:
    """Return the connection with TLS, after its handshake. If that fails, the socket is closed."""
    try:
        connection = client_socket(sock, files)
    except OSError as error:
        sock.close()
        raise _FilesUnusable(str(error)) from None
    try:
        while not connection.shake_hands():
            poller = select.poll()
            poller.register(connection.fileno(), select.POLLIN)
            if not poller.poll(max(deadline - time.monotonic(), 0) * 1000):
                raise _NoAnswer
    except BaseException as error:
        connection.close()
        if isinstance(error, NotTls):
            raise ConfigError(f"{address} does not use TLS: give --cluster-tls to all hosts, or to none") from None
        if isinstance(error, ssl.SSLError) and not isinstance(error, _ENDED):
            raise ConfigError(f"{address} can't be joined: {explain(error)}") from None
        if isinstance(error, OSError):
            raise _ConnectionEnded from None
        raise
    return connection


def _authenticate(
    channel: Channel, hello: Hello, address: Address, key: str, deadline: float, *, encrypted: bool
) -> None:
    encoded = encode(hello)
    if not encrypted:
        with contextlib.suppress(ChannelClosed):  # `_receive` will notice it
            channel.send(encode(Knock()))
    while True:
        for message in _receive(channel, deadline, address):
            match message:
                case Challenge():
                    with contextlib.suppress(ChannelClosed):  # `_receive` will notice it
                        channel.send(encode(Signed(encoded, proof(key, "member", message.nonce, encoded))))
                case Welcome():
                    if not hmac.compare_digest(message.proof, proof(key, "rendezvous", hello.nonce, encoded)):
                        raise ConfigError(f"{address} does not know the shared key: is another program there?")
                    return
                case JoinRefused():
                    why = f"rank {hello.rank} may not join at {address}: {message.why}"
                    raise _RefusedForNow(why) if message.again else ConfigError(why)


def _receive(channel: Channel, deadline: float, address: Address) -> list[FromRendezvous]:
    """Return one message at most, so that messages after a Welcome are left for the owner of the channel."""
    left = deadline - time.monotonic()
    if left <= 0 or (not channel.has_frame and not wait([channel], left)):
        raise _NoAnswer
    try:
        return [from_rendezvous.decode(frame) for frame in channel.receive(1)]
    except ChannelClosed as ended:
        cause = ended.__cause__
        if isinstance(cause, ssl.SSLError) and not isinstance(cause, _ENDED):  # it has checked our certificate last
            raise ConfigError(f"{address} can't be joined: {explain(cause)}") from None
        raise _ConnectionEnded from None
    except WireError:
        raise ConfigError(f"{address} uses another protocol: is another program there?") from None


@dataclass(slots=True)
class _Inbox:
    """The messages that a member's thread has read. `changed` guards all fields."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    posted: dict[str, dict[int, bytes]] = field(default_factory=dict)  # topic -> sender -> latest payload
    gone: dict[int, str] = field(default_factory=dict)  # rank -> why it has left, "" if its work had ended
    waiting: RoomWaiting | None = None
    complete: RoomComplete | None = None
    lost: str = ""  # why the connection has ended, as shown to the user


class RoomMember:
    """A member of a room. A thread keeps the connection alive and reads messages; the owner calls the methods."""

    def __init__(
        self,
        address: Address,
        credentials: Credentials,
        *,
        room: str,
        rank: int,
        size: int,
        agreement: Mapping[str, str] | None = None,
        timeout: float,
        returning: bool = False,
    ) -> None:
        """Join a room, and wait until it is complete. `returning`: see `connect`.

        Raises:
            ConfigError: the rendezvous cannot be reached or refuses this process, or the room is not complete within
                `timeout` seconds; the error says who is missing.
            EngineError: the connection has ended; or with `returning`, the rendezvous or a member is missing in time.
        """
        self.rank = rank
        self.size = size
        self._address = address
        self._inbox = _Inbox()
        self._leaving = False
        begun = time.monotonic()
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            self._channel = connect(
                address,
                credentials,
                room=room,
                rank=rank,
                size=size,
                agreement=agreement,
                timeout=timeout,
                returning=returning,
            )
        except BaseException:
            os.close(self._wakeup)
            raise
        self.host_address: str = self._channel.local_address  # the address of this host that other hosts can reach
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"shoal-member-{rank}")
        self._thread.start()
        try:
            self._await_completion(begun, timeout, EngineError if returning else ConfigError)
        except BaseException:
            self.close()
            raise

    def _await_completion(self, begun: float, timeout: float, timeout_error: type[ShoalError]) -> None:
        last_report = begun
        with self._inbox.changed:
            while self._inbox.complete is None:
                left = timeout - (time.monotonic() - begun)
                missing = self._describe_missing()
                if self._inbox.lost:
                    raise EngineError(self._inbox.lost)
                if left <= 0:
                    raise timeout_error(f"not all have arrived at {self._address} within {timeout:g} s: {missing}")
                if time.monotonic() - last_report >= REPORT_S:
                    last_report = time.monotonic()
                    log.info("waiting at %s, %.0f s of %g: %s", self._address, last_report - begun, timeout, missing)
                self._inbox.changed.wait(min(left, REPORT_S))

    def _describe_missing(self) -> str:
        waiting = self._inbox.waiting
        if waiting is None:
            return f"only rank {self.rank} has arrived"
        missing = ", ".join(map(str, waiting.missing))
        return f"rank{'s' if len(waiting.missing) > 1 else ''} {missing} missing, arrived: {', '.join(waiting.arrived)}"

    @property
    def members(self) -> tuple[str, ...]:
        """The members' names, by rank."""
        return () if self._inbox.complete is None else self._inbox.complete.members

    @property
    def formation(self) -> int:
        """The number of this room, which no other room of this rendezvous has had."""
        return 0 if self._inbox.complete is None else self._inbox.complete.formation

    def fileno(self) -> int:
        """Return a file descriptor that is readable from the arrival of a message until `clear` is called."""
        return self._wakeup

    backlog = False

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wakeup)

    def post(self, topic: str, payload: bytes, to: int = -1) -> None:
        """Post a message to one other member, or to all others. Members keep the latest post under each topic.

        Raises:
            EngineError: the connection to the rendezvous has ended.
        """
        try:
            self._channel.send(encode(RoomMessage(topic, self.rank, to, payload)))
        except ChannelClosed:
            raise EngineError(f"the rendezvous at {self._address} has gone") from None

    def latest(self, topic: str) -> dict[int, bytes]:
        """Return the latest post of each member under a topic, by rank. Never blocks."""
        with self._inbox.changed:
            return dict(self._inbox.posted.get(topic, {}))

    def failures(self) -> dict[int, str]:
        """Return the members that have left before the end of their work, and why. Rank -1 is the rendezvous itself."""
        with self._inbox.changed:
            found = {rank: why for rank, why in self._inbox.gone.items() if why}
            if self._inbox.lost and not self._leaving:
                found[-1] = self._inbox.lost
            return found

    def gone(self) -> list[int]:
        """Return the members that have left, before or after the end of their work."""
        with self._inbox.changed:
            return sorted(self._inbox.gone)

    def collect(
        self,
        topic: str,
        payload: bytes,
        *,
        timeout: float,
        describe: Callable[[int], str] = "rank {}".format,
    ) -> list[bytes] | None:
        """Collect the payloads of all members at rank 0, which gets them by rank. Other ranks get None and do not wait.

        Raises:
            EngineError: a member has left, or has not posted within `timeout` seconds. `describe` gives the text that
                the error shows for a missing rank.
        """
        if self.rank != 0:
            self.post(topic, payload, to=0)
            self._flush(timeout)
            return None
        deadline = time.monotonic() + timeout
        with self._inbox.changed:
            while True:
                found = {**self._inbox.posted.get(topic, {}), 0: payload}
                missing = [rank for rank in range(self.size) if rank not in found]
                if not missing:
                    return [found[rank] for rank in range(self.size)]
                dead = [rank for rank in missing if rank in self._inbox.gone]
                left = deadline - time.monotonic()
                if dead or left <= 0 or self._inbox.lost:
                    why = "; ".join(self._inbox.gone[rank] or f"rank {rank} ended without it" for rank in dead)
                    who = "; ".join(describe(rank) for rank in missing)
                    raise EngineError(f"{topic}: {why or f'not all have come within {timeout:g} s'}; missing: {who}")
                self._inbox.changed.wait(min(left, REPORT_S))

    def await_post(self, topic: str, sender: int, *, timeout: float) -> bytes:
        """Wait for a member's post, and return it.

        Raises:
            EngineError: the member has left, or has not posted within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        with self._inbox.changed:
            while sender not in self._inbox.posted.get(topic, {}):
                left = deadline - time.monotonic()
                if sender in self._inbox.gone or self._inbox.lost or left <= 0:
                    why = self._inbox.gone.get(sender) or self._inbox.lost or f"nothing within {timeout:g} s"
                    raise EngineError(f"{topic}: no message from rank {sender}: {why}")
                self._inbox.changed.wait(min(left, REPORT_S))
            return self._inbox.posted[topic][sender]

    def _flush(self, timeout: float) -> None:
        try:
            if not self._channel.flush(timeout):
                raise EngineError(f"the rendezvous at {self._address} did not take a message within {timeout:g} s")
        except ChannelClosed:
            raise EngineError(f"the rendezvous at {self._address} has gone") from None

    def close(self, why: str = "", *, patience: float = _ATTEMPT_S) -> None:
        """Leave the room. May be called again.

        why: the reason that the other members get, or "" if the work has ended. patience: the most seconds to wait for
        a rendezvous that does not read.
        """
        if self._leaving:
            return
        self._leaving = True
        try:
            self._channel.send(encode(Leave(why)))
            self._channel.flush(patience)
        except ChannelClosed:
            pass
        self._thread.join(patience)  # the rendezvous closes the connection of a member that leaves
        self._channel.shut_down()
        self._thread.join()  # before its channel is closed
        self._channel.close()
        os.close(self._wakeup)

    def _run(self) -> None:
        last_received = next_heartbeat = time.monotonic()
        while True:
            try:
                now = time.monotonic()
                if now - next_heartbeat > HEARTBEAT_TIMEOUT_S:  # this process was suspended: unread messages may wait
                    last_received = now
                if now >= next_heartbeat:
                    next_heartbeat = now + HEARTBEAT_S
                    self._channel.send(encode(Alive()))
                if self._channel.has_frame or wait([self._channel], next_heartbeat - now):
                    last_received = time.monotonic()  # a single frame may take longer than HEARTBEAT_TIMEOUT_S
                    for frame in self._channel.receive():
                        self._take(from_rendezvous.decode(frame))
                if time.monotonic() - last_received > HEARTBEAT_TIMEOUT_S:
                    raise ChannelClosed(f"no message for {HEARTBEAT_TIMEOUT_S:.0f} s")
            except (ChannelClosed, WireError, OSError) as error:
                why = str(error) or "its connection has ended"
                with self._inbox.changed:
                    if not self._inbox.lost:
                        self._inbox.lost = f"the rendezvous at {self._address} has gone ({why})"
                    self._inbox.changed.notify_all()
                if not self._leaving:
                    os.eventfd_write(self._wakeup, 1)
                return

    def _take(self, message: FromRendezvous) -> None:
        with self._inbox.changed:
            match message:
                case RoomMessage():
                    self._inbox.posted.setdefault(message.topic, {})[message.sender] = message.payload
                case MemberGone():
                    self._inbox.gone[message.rank] = message.why
                case RoomWaiting():
                    self._inbox.waiting = message
                case RoomComplete():
                    self._inbox.complete = message
                case JoinRefused():
                    self._inbox.lost = f"the rendezvous at {self._address} removed rank {self.rank}: {message.why}"
            self._inbox.changed.notify_all()
        if not self._leaving:
            os.eventfd_write(self._wakeup, 1)
