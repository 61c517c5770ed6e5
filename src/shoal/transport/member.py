"""Joining a rendezvous, and what a member of a room can do there."""

import contextlib
import hmac
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from shoal import addresses
from shoal.addresses import Address
from shoal.errors import ConfigError, EngineError, ShoalError
from shoal.log import get_logger
from shoal.transport.channel import Channel, ChannelClosed, wait
from shoal.transport.rendezvous import ALIVE_S, QUIET_S, SAY_S, proof, require_key, this_process, watch_host
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
    Welcome,
    from_rendezvous,
)

log = get_logger("rendezvous")

_RETRY_S = 0.2
_SAY_RETURNING_S = 60.0  # how often it is said for whom one waits that has been there before
_ATTEMPT_S = 2.0
REFUSED_S = 15.0  # for somebody with our number, who may have been cut off, to be given up


class _HungUp(Exception):
    """Somebody listens, and ended the connection before it said yes or no."""


class _Silent(Exception):
    """Somebody listens, and says nothing."""


class _RefusedForNow(Exception):
    pass


def connect(
    address: Address,
    key: str,
    *,
    room: str = "",
    rank: int = 0,
    size: int = 0,
    agreement: Mapping[str, str] | None = None,
    report: bytes = b"",
    timeout: float,
    returning: bool = False,
) -> Channel:
    """A connection on which both sides have proved that they know the key. Without a `size` no room is joined. A door
    is asked for like a room, by its name.

    The rendezvous may be opened later than this is called, or may be so busy with others that it hangs up. `returning`:
    we have been there before, so nothing is wrong with the address or our number.

    Raises:
        ConfigError: it refuses us, or can't be reached in time; it says why.
        EngineError: `returning`, and it can't be reached, or does not let us in, in time.
    """
    require_key(key, address.host)
    host, pid = this_process()
    hello = Hello(room, rank, size, host, pid, secrets.token_bytes(32), dict(agreement or {}), report)
    begun = time.monotonic()
    said = begun
    refused_since: float | None = None
    missed = EngineError if returning else ConfigError
    while True:
        left = timeout - (time.monotonic() - begun)
        try:
            sock = addresses.connect(address, max(min(left, _ATTEMPT_S), 0.01))
            return _introduced(sock, hello, address, key, max(timeout - (time.monotonic() - begun), _ATTEMPT_S))
        except OSError as error:
            why = error.strerror or str(error)
            final = (
                f"no answer from {address} within {timeout:g} s ({why}), and nobody has arrived: start rank 0 there, "
                "or give the address and port at which it listens"
            )
            refused_since = None
        except _Silent:
            why = "it says nothing"
            final = f"{address} did not answer in time: is another program there?"
            refused_since = None
        except _HungUp:
            refused_since = None
            why = "it hangs up"
            final = f"{address} hung up again and again for {timeout:g} s: is another program there?"
        except _RefusedForNow as error:
            refused_since = time.monotonic() if refused_since is None else refused_since
            why = final = str(error)
            if time.monotonic() - refused_since > REFUSED_S and not returning:
                raise ConfigError(final) from None
        if time.monotonic() - begun + _RETRY_S >= timeout:
            raise missed(final)
        if time.monotonic() - said >= (_SAY_RETURNING_S if returning else SAY_S):
            said = time.monotonic()
            log.info("waiting for %s (%s), %.0f s of %g", address, why, said - begun, timeout)
        time.sleep(_RETRY_S)


def _introduced(sock: socket.socket, hello: Hello, address: Address, key: str, timeout: float) -> Channel:
    """Closes the socket if that fails."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    watch_host(sock)
    channel = Channel(sock)
    try:
        _introduce(channel, hello, address, key, timeout)
    except BaseException:
        channel.close()
        raise
    return channel


def _introduce(channel: Channel, hello: Hello, address: Address, key: str, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    said = encode(hello)
    while True:
        for message in _receive(channel, deadline, address):
            match message:
                case Challenge():
                    with contextlib.suppress(ChannelClosed):  # its end is read, and said, in turn
                        channel.send(encode(Signed(said, proof(key, "member", message.nonce, said))))
                case Welcome():
                    if not hmac.compare_digest(message.proof, proof(key, "rendezvous", hello.nonce, said)):
                        raise ConfigError(f"{address} does not know the shared key: is another program there?")
                    return
                case JoinRefused():
                    why = f"rank {hello.rank} may not join at {address}: {message.why}"
                    raise _RefusedForNow(why) if message.again else ConfigError(why)


def _receive(channel: Channel, deadline: float, address: Address) -> list[FromRendezvous]:
    """One frame, so that what follows a welcome is left for whoever reads next."""
    left = deadline - time.monotonic()
    if left <= 0 or (not channel.has_frame and not wait([channel], left)):
        raise _Silent
    try:
        return [from_rendezvous.decode(frame) for frame in channel.receive(1)]
    except ChannelClosed:
        raise _HungUp from None
    except WireError:
        raise ConfigError(f"{address} speaks another language: is another program there?") from None


@dataclass(slots=True)
class _Inbox:
    """What a member's thread has read; `changed` guards it."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    posted: dict[str, dict[int, bytes]] = field(default_factory=dict)  # topic -> sender -> the latest
    gone: dict[int, str] = field(default_factory=dict)
    waiting: RoomWaiting | None = None
    started: RoomComplete | None = None
    lost: str = ""  # why there is no connection any more, as the user reads it


class RoomMember:
    """One in a room. A thread keeps the connection alive and reads what comes; all else is called by the owner."""

    def __init__(
        self,
        address: Address,
        key: str,
        *,
        room: str,
        rank: int,
        size: int,
        agreement: Mapping[str, str] | None = None,
        timeout: float,
        returning: bool = False,
    ) -> None:
        """Waits until the room is complete. `returning`: as for `connect`.

        Raises:
            ConfigError: the rendezvous is not there or refuses us, or not all arrived within `timeout` seconds; it says
                who is missing.
            EngineError: the rendezvous has gone; or `returning`, and it or somebody else is not there in time.
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
                key,
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
        self.host_address: str = self._channel.local_address  # of this host, as the others reach it
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"shoal-member-{rank}")
        self._thread.start()
        try:
            self._await_start(begun, timeout, EngineError if returning else ConfigError)
        except BaseException:
            self.close()
            raise

    def _await_start(self, begun: float, timeout: float, missed: type[ShoalError]) -> None:
        said = begun
        with self._inbox.changed:
            while self._inbox.started is None:
                left = timeout - (time.monotonic() - begun)
                who = self._who_is_missing()
                if self._inbox.lost:
                    raise EngineError(self._inbox.lost)
                if left <= 0:
                    raise missed(f"not all have arrived at {self._address} within {timeout:g} s: {who}")
                if time.monotonic() - said >= SAY_S:
                    said = time.monotonic()
                    log.info("waiting at %s, %.0f s of %g: %s", self._address, said - begun, timeout, who)
                self._inbox.changed.wait(min(left, SAY_S))

    def _who_is_missing(self) -> str:
        waiting = self._inbox.waiting
        if waiting is None:
            return f"nobody is known but rank {self.rank}"
        missing = ", ".join(map(str, waiting.missing))
        return f"rank{'s' if len(waiting.missing) > 1 else ''} {missing} missing, arrived: {', '.join(waiting.arrived)}"

    @property
    def members(self) -> tuple[str, ...]:
        """Who they are, by rank."""
        return () if self._inbox.started is None else self._inbox.started.members

    @property
    def formation(self) -> int:
        """A number that no other room of this rendezvous has had, and no earlier one of this name."""
        return 0 if self._inbox.started is None else self._inbox.started.formation

    def fileno(self) -> int:
        """Readable when something has come, until `quiet` is called."""
        return self._wakeup

    backlog = False

    def quiet(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wakeup)

    def post(self, topic: str, payload: bytes, to: int = -1) -> None:
        """To one other member, or to all others. Of several posts under one topic only the latest is kept.

        Raises:
            EngineError: the rendezvous has gone.
        """
        try:
            self._channel.send(encode(RoomMessage(topic, self.rank, to, payload)))
        except ChannelClosed:
            raise EngineError(f"the rendezvous at {self._address} has gone") from None

    def latest(self, topic: str) -> dict[int, bytes]:
        """The latest post of each member under a topic, by rank. Never blocks."""
        with self._inbox.changed:
            return dict(self._inbox.posted.get(topic, {}))

    def failures(self) -> dict[int, str]:
        """Members that have gone without having ended their work, and why; the rendezvous itself is rank -1."""
        with self._inbox.changed:
            found = {rank: why for rank, why in self._inbox.gone.items() if why}
            if self._inbox.lost and not self._leaving:
                found[-1] = self._inbox.lost
            return found

    def gone(self) -> list[int]:
        """Members that have left, whether their work had ended or not."""
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
        """Everybody's payload, by rank, at rank 0; None at the others, which do not wait.

        Raises:
            EngineError: somebody has gone, or has not posted within `timeout` seconds; `describe` says what is missing
                with a rank.
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
                self._inbox.changed.wait(min(left, SAY_S))

    def await_post(self, topic: str, sender: int, *, timeout: float) -> bytes:
        """One member's post.

        Raises:
            EngineError: it has gone, or has not posted within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        with self._inbox.changed:
            while sender not in self._inbox.posted.get(topic, {}):
                left = deadline - time.monotonic()
                if sender in self._inbox.gone or self._inbox.lost or left <= 0:
                    why = self._inbox.gone.get(sender) or self._inbox.lost or f"nothing within {timeout:g} s"
                    raise EngineError(f"{topic}: no word of rank {sender}: {why}")
                self._inbox.changed.wait(min(left, SAY_S))
            return self._inbox.posted[topic][sender]

    def _flush(self, timeout: float) -> None:
        try:
            if not self._channel.flush(timeout):
                raise EngineError(f"the rendezvous at {self._address} did not take a message within {timeout:g} s")
        except ChannelClosed:
            raise EngineError(f"the rendezvous at {self._address} has gone") from None

    def close(self, why: str = "", *, patience: float = _ATTEMPT_S) -> None:
        """Leaves: `why` is empty when all is done, else what the others will say of us. A rendezvous that does not
        listen is given up after `patience` seconds. Idempotent."""
        if self._leaving:
            return
        self._leaving = True
        try:
            self._channel.send(encode(Leave(why)))
            self._channel.flush(patience)
        except ChannelClosed:
            pass
        self._thread.join(patience)  # the rendezvous hangs up on whoever leaves
        self._channel.hang_up()
        self._thread.join()  # it uses what is closed next
        self._channel.close()
        os.close(self._wakeup)

    def _run(self) -> None:
        heard = next_sign = time.monotonic()
        while True:
            try:
                now = time.monotonic()
                if now - next_sign > QUIET_S:  # this process was stopped: what was said meanwhile is yet to be read
                    heard = now
                if now >= next_sign:
                    next_sign = now + ALIVE_S
                    self._channel.send(encode(Alive()))
                if self._channel.has_frame or wait([self._channel], next_sign - now):
                    heard = time.monotonic()  # a frame may take longer than QUIET_S to come
                    for frame in self._channel.receive():
                        self._take(from_rendezvous.decode(frame))
                if time.monotonic() - heard > QUIET_S:
                    raise ChannelClosed(f"not heard from for {QUIET_S:.0f} s")
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
                    self._inbox.started = message
                case JoinRefused():
                    self._inbox.lost = f"the rendezvous at {self._address} showed rank {self.rank} out: {message.why}"
            self._inbox.changed.notify_all()
        if not self._leaving:
            os.eventfd_write(self._wakeup, 1)
