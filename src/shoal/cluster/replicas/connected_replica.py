"""A replica that another host has started, seen from the front end to which it has connected."""

import contextlib
import time

from shoal.cluster.replicas.replica import Replica
from shoal.transport.channel import Channel, ChannelClosed, wait
from shoal.wire.engine import SeqUpdate
from shoal.wire.plan import EnginePlan
from shoal.wire.rendezvous import Hello

_LARGEST_TOKEN = 2**31 - 1
_MAX_FRAME_BYTES = 1 << 30


class ConnectedReplica(Replica):
    """A replica at the other end of a TCP connection. `host` and `pid` say where it runs.

    It is ready when it has sent its first stats. `close` ends only the connection: the replica keeps its weights and
    awaits the next front end. `dismiss` ends the replica.
    """

    def __init__(self, hello: Hello, channel: Channel, plan: EnginePlan, *, answer_timeout: float) -> None:
        """Send the plan to the replica.

        Raises:
            EngineError: the replica has hung up.
        """
        self.host = hello.host
        self.pid = hello.pid
        self._engine = _RemoteEngine(channel)
        name = f"replica {hello.rank} ({hello.host}, process {hello.pid})"
        super().__init__(self._engine, plan, name=name, answer_timeout=answer_timeout, one_of_many=True)

    @property
    def connected(self) -> bool:
        return not self._engine.gone

    def say_goodbye(self) -> None:
        """Do nothing: the replica has loaded its weights, and the next front end may need them."""

    def dismiss(self) -> None:
        """Tell the replica to end. Its host does not start it again."""
        super().say_goodbye()

    def updates(self, timeout: float) -> list[SeqUpdate]:
        found = super().updates(timeout)
        for update in found:
            for token in update.tokens:
                if not 0 <= token <= _LARGEST_TOKEN:
                    self._fail(f"{self.name} sent {token}, which is no token")
        return found


class _RemoteEngine:
    """An engine on another host as an `EngineHost`. Its own supervisor ends it; from here only the connection ends."""

    def __init__(self, channel: Channel) -> None:
        channel.max_frame_bytes = _MAX_FRAME_BYTES
        self.channel = channel
        self.gone = False
        self._told_to_end = False

    def stopped(self) -> bool:
        return False  # the supervisor on its host watches for that

    def describe_exit(self, patience: float = 1.0) -> str:
        return "ended, or lost its connection"

    def say(self, goodbye: bytes) -> None:
        self._told_to_end = True
        with contextlib.suppress(ChannelClosed, OSError):
            self.channel.send(goodbye)

    def wait(self, timeout: float) -> bool:
        """Wait until an engine that was told to end has hung up. An engine that was not told is not waited for."""
        deadline = time.monotonic() + timeout
        while self._told_to_end and not self.gone:
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
