"""A member of a room at a rendezvous: it joins, and exchanges messages with the other members."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from shoal.addresses import Address
from shoal.errors import ConfigError, EngineError, ShoalError
from shoal.log import get_logger
from shoal.transport.channel import ChannelClosed, wait
from shoal.transport.connecting import connect
from shoal.transport.rendezvous import HEARTBEAT_S, HEARTBEAT_TIMEOUT_S, REPORT_S
from shoal.wire.base import WireError, encode
from shoal.wire.credentials import Credentials
from shoal.wire.rendezvous import (
    Alive,
    FromRendezvous,
    JoinRefused,
    Leave,
    MemberGone,
    RoomComplete,
    RoomMessage,
    RoomWaiting,
    from_rendezvous,
)

log = get_logger("rendezvous")

_CLOSE_S = 2.0


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

    def close(self, why: str = "", *, patience: float = _CLOSE_S) -> None:
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
