"""Replicas that other hosts have started: the door at which they arrive, and how they look to a fleet from then on."""

import contextlib
import socket
import time
from collections.abc import Callable, Collection, Mapping

from shoal.cluster.members.replica import Replica
from shoal.transport.channel import Channel, ChannelClosed, wait
from shoal.transport.rendezvous import describe_difference
from shoal.wire.engine import SeqUpdate
from shoal.wire.rendezvous import Hello, JoinRefused

FRONT_END = "front end"  # what the doors are called in a Hello
PEERS = "peers"

_LARGEST_TOKEN = 2**31 - 1
_MAX_FRAME_BYTES = 1 << 30


class _OtherHost:
    """An engine at the other end of a TCP connection. It belongs to somebody else, who sees to its end: here only the
    connection can be ended."""

    def __init__(self, channel: Channel) -> None:
        channel.max_frame_bytes = _MAX_FRAME_BYTES
        self.channel = channel
        self.gone = False
        self._asked = False  # to end

    def stopped(self) -> bool:
        return False  # its own supervisor looks after that

    def describe_exit(self, patience: float = 1.0) -> str:
        return "ended, or lost its connection"

    def say(self, goodbye: bytes) -> None:
        self._asked = True
        with contextlib.suppress(ChannelClosed, OSError):
            self.channel.send(goodbye)

    def wait(self, timeout: float) -> bool:
        """Once it was asked to end, for it to hang up. Nobody waits for one that was not asked."""
        deadline = time.monotonic() + timeout
        while self._asked and not self.gone:
            if not wait([self.channel], max(0.0, deadline - time.monotonic())):
                return False
            try:
                self.channel.receive()
            except ChannelClosed:
                self.gone = True
        return True

    def kill(self) -> None:
        self.gone = True
        self.channel.close()


class Arrival(Replica):
    """`host` and `pid` are where it runs. It is ready when it says so, and goes on after `close`: only `dismiss` ends
    it."""

    def __init__(self, hello: Hello, channel: Channel, *, answer_timeout: float) -> None:
        self.host = hello.host
        self.pid = hello.pid
        self._other = _OtherHost(channel)
        name = f"replica {hello.rank} ({hello.host}, process {hello.pid})"
        super().__init__(self._other, None, name=name, answer_timeout=answer_timeout, one_of_many=True)

    @property
    def connected(self) -> bool:
        return not self._other.gone

    def say_goodbye(self) -> None:
        """Nothing: its weights are loaded, and the next front end may want them."""

    def dismiss(self) -> None:
        """Has it end for good; nobody starts it again."""
        super().say_goodbye()

    def updates(self, timeout: float) -> list[SeqUpdate]:
        found = super().updates(timeout)
        for update in found:
            for token in update.tokens:
                if not 0 <= token <= _LARGEST_TOKEN:
                    self._fail(f"{self.name} sent what is no token: {token}")
        return found


class FleetDoor:
    """Lets in the replicas that a fleet awaits, one of each number."""

    def __init__(
        self,
        *,
        size: int,
        awaited: Collection[int],
        agreement: Mapping[str, str],
        answer_timeout: float,
        uncompared: Collection[str] = (),
    ) -> None:
        """It stays shut until `open` is called. What is `uncompared` replicas may have otherwise."""
        self._size = size
        self._awaited = awaited
        self._agreement = agreement
        self._answer_timeout = answer_timeout
        self._uncompared = uncompared
        self._arrive: Callable[[int, Arrival], None] | None = None
        self._present: dict[int, Arrival] = {}
        self._whose = f"the front end ({socket.gethostname()})"

    def open(self, arrive: Callable[[int, Arrival], None]) -> None:
        """`arrive` is told of each, on the thread of the rendezvous."""
        self._arrive = arrive

    def objection(self, hello: Hello) -> JoinRefused | None:
        if self._arrive is None:
            return JoinRefused(f"{self._whose} has only begun to start", again=True)
        if hello.size != self._size:
            return JoinRefused(
                f"it counts {hello.size} replicas, {self._whose} counts {self._size}: give all the same "
                "--data-parallel-size"
            )
        if hello.rank not in self._awaited:
            awaited = ", ".join(map(str, sorted(self._awaited)[:8])) + (", ..." if len(self._awaited) > 8 else "")
            return JoinRefused(
                f"{self._whose} does not await replica {hello.rank}, but {awaited}: see --data-parallel-start-rank and "
                "--data-parallel-size-local"
            )
        told = {name: value for name, value in hello.agreement.items() if name not in self._uncompared}
        why = describe_difference(told, self._agreement, self._whose)
        if why:
            return JoinRefused(why)
        there = self._present.get(hello.rank)
        if there is not None and there.connected:
            # It may have been cut off, and that not be known here yet.
            return JoinRefused(f"{there.name} is there already: give every replica a number of its own", again=True)
        return None

    def enter(self, hello: Hello, channel: Channel) -> None:
        assert self._arrive is not None
        arrival = self._present[hello.rank] = Arrival(hello, channel, answer_timeout=self._answer_timeout)
        self._arrive(hello.rank, arrival)


class PeersDoor:
    """Where replicas that are served one by one, or host by host, compare what must be the same for all; then they go
    their own ways."""

    def __init__(self, *, size: int, agreement: Mapping[str, str]) -> None:
        self._size = size
        self._agreement = agreement
        self._whose = f"replica 0 ({socket.gethostname()})"

    def objection(self, hello: Hello) -> JoinRefused | None:
        if hello.size != self._size:
            return JoinRefused(f"it counts {hello.size} replicas, {self._whose} counts {self._size}")
        why = describe_difference(hello.agreement, self._agreement, self._whose)
        return JoinRefused(why) if why else None

    def enter(self, hello: Hello, channel: Channel) -> None:
        channel.close()
