"""Ranks that a node starts: on another host, reached over one connection to the node, or on this one, reached directly.

A node may be on the engine's host, as an actor of Ray or as a second program. Then it hands the channels to its ranks
over to the engine.
"""

import contextlib
import os
import threading
import time
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from shoal import env
from shoal.config.engine_options import options
from shoal.errors import RankFailed
from shoal.executors.local_ranks import start_order
from shoal.log import get_logger
from shoal.transport.channel import Channel, ChannelClosed
from shoal.transport.handover import ChannelReceiver
from shoal.transport.rendezvous import Rendezvous, describe_difference
from shoal.wire.base import WireError, encode
from shoal.wire.nodes import (
    ENGINE_DOOR,
    ENGINE_START,
    ForAllRanks,
    ForRank,
    KeepSpares,
    RankEnded,
    RankStarted,
    RankSuspended,
    StartRank,
    from_node,
)
from shoal.wire.plan import EnginePlan, NodePlan
from shoal.wire.ranks import FromRank, RankSetup, from_rank
from shoal.wire.rendezvous import Hello, JoinRefused

log = get_logger("executor")

_REPORT_S = 10.0  # how often the log says which nodes are missing
_FLUSH_S = 1.0


class NodeListener:
    """The place where an engine awaits the nodes of its plan. Its ranks find each other there too."""

    def __init__(self, plan: EnginePlan, start: str) -> None:
        """Listen at the address of this host.

        Args:
            start: marks this start of the engine. A node that was called by another start is refused.

        Raises:
            ConfigError: this host has no such address, or all of its ports are in use.
        """
        self.nodes: Mapping[int, NodePlan] = plan.nodes_elsewhere
        self._door = _EngineDoor(self.nodes, len(plan.nodes), start)
        place = plan.place
        self._rendezvous = Rendezvous(
            place.address, credentials=place.credentials, ports=place.ports, doors={ENGINE_DOOR: self._door}
        )
        self.address = self._rendezvous.address
        self.receiver = ChannelReceiver()

    def gather(self, timeout: float) -> dict[int, Channel]:
        """Wait for all nodes, and return the connections to them by number.

        Raises:
            RankFailed: not all have come within `timeout` seconds; the error names those that are missing.
        """
        begun = time.monotonic()
        while missing := self._door.missing(_REPORT_S):
            waited = time.monotonic() - begun
            names = ", ".join(self.nodes[number].name for number in missing)
            if waited > timeout:
                raise RankFailed(f"{names} did not come to the engine at {self.address} within {timeout:g} s")
            log.info("waiting at %s for %s, %.0f s of %g", self.address, names, waited, timeout)
        return self._door.channels

    def close(self) -> None:
        self._rendezvous.close()
        self.receiver.close()


class _EngineDoor:
    """The door of an engine, through which each of its nodes comes once."""

    def __init__(self, nodes: Mapping[int, NodePlan], size: int, start: str) -> None:
        self.channels: dict[int, Channel] = {}
        self._nodes = nodes
        self._size = size
        self._start = start
        self._name = f"the engine (process {os.getpid()})"
        self._changed = threading.Condition()

    def objection(self, hello: Hello) -> JoinRefused | None:
        if hello.size != self._size or hello.rank not in self._nodes:
            return JoinRefused(f"{self._name} has no node {hello.rank} of {hello.size}")
        if why := describe_difference(hello.agreement, {ENGINE_START: self._start}, self._name):
            return JoinRefused(why)
        if hello.rank in self.channels:
            return JoinRefused(f"node {hello.rank} is with {self._name} already")
        return None

    def enter(self, hello: Hello, channel: Channel) -> None:
        with self._changed:
            self.channels[hello.rank] = channel
            self._changed.notify_all()

    def missing(self, timeout: float) -> list[int]:
        """Return the numbers of the nodes that have not come yet, after waiting up to `timeout` seconds for them."""
        with self._changed:
            self._changed.wait_for(lambda: len(self.channels) == len(self._nodes), timeout)
            return [number for number in self._nodes if number not in self.channels]


@dataclass(slots=True)
class _Start:
    """A start of a rank's process that its node has not answered yet."""

    unanswered: int  # orders, of which only the last one counts
    frames: list[bytes] = field(default_factory=list)  # for the rank, in their order


class NodeRanks:
    """A `RankPart` of the ranks of one node."""

    def __init__(
        self, node: NodePlan, channel: Channel, receiver: ChannelReceiver, setups: Sequence[RankSetup]
    ) -> None:
        """Start nothing yet.

        Args:
            channel: the connection to the node.
            receiver: where the node hands over the channels to its ranks if it is on this host.
        """
        self.ranks: Sequence[int] = [setup.rank for setup in setups]
        self.ended: dict[int, str] = {}
        self.can_replace = True  # False: the node is lost
        self._name = node.name
        self._setups = setups
        self._orders: dict[int, StartRank] = {}
        self._channel = channel
        self._receiver = receiver
        self._direct: dict[int, Channel] = {}  # the channels to the ranks that were handed over
        self._starting: dict[int, _Start] = {}
        self._pids: dict[int, int] = {}
        self._suspended: set[int] = set()

    def start(self) -> None:
        variables = env.shared_variables(option.name for option in options())
        if variables:
            log.info("ranks of %s get these variables unless they are set there: %s", self._name, ", ".join(variables))
        name = self._receiver.name
        self._orders = {setup.rank: start_order(setup, variables, name) for setup in self._setups}
        for rank in self._orders:
            self._start(rank)

    def replace(self, rank: int) -> None:
        for known in (self.ended, self._pids):
            known.pop(rank, None)
        self._suspended.discard(rank)
        self._close_direct(rank)
        self._start(rank)

    def _start(self, rank: int) -> None:
        """Have the node start the process of a rank. What is sent to the rank waits for the answer."""
        self._starting[rank] = _Start(1 + (self._starting[rank].unanswered if rank in self._starting else 0))
        self._send(encode(self._orders[rank]))

    def keep_spares(self) -> None:
        first = self._setups[0]
        self._send(encode(KeepSpares(first.plan.warm_spares_on(first.rank_plan.node))))

    @property
    def channels(self) -> list[Channel]:
        return [self._channel, *self._direct.values()]

    def send(self, frame: bytes, rank: int | None = None) -> None:
        if rank is None and not self._direct and not self._starting:
            self._send(encode(ForAllRanks(frame)))
            return
        for each in self.ranks if rank is None else [rank]:
            self._send_to(each, frame)

    def _send_to(self, rank: int, frame: bytes) -> None:
        if rank in self._starting:
            self._starting[rank].frames.append(frame)
        elif rank in self._direct:
            with contextlib.suppress(ChannelClosed):  # `receive` will notice it
                self._direct[rank].send(frame)
        else:
            self._send(encode(ForRank(rank, frame)))

    def _send(self, frame: bytes) -> None:
        with contextlib.suppress(ChannelClosed):  # `receive` will notice it
            self._channel.send(frame)

    def receive(self, readable: Container[Channel]) -> Iterable[FromRank]:
        messages = self._receive_directly(readable)
        if self._channel not in readable:
            return messages
        try:
            for frame in self._channel.receive():
                match message := from_node.decode(frame):
                    case RankStarted():
                        self._note_start(message)
                    case RankEnded():
                        self._note_end(message)
                    case RankSuspended():
                        self._suspended.add(message.rank)
                    case _:
                        messages.append(message)
        except ChannelClosed:
            self._end_all(f"is lost: {self._name} has ended, or its connection was cut")
        except WireError as error:
            self._end_all(f"is lost: {self._name} sent a message that cannot be read: {error}")
        return messages

    def _receive_directly(self, readable: Container[Channel]) -> list[FromRank]:
        messages: list[FromRank] = []
        for rank, channel in list(self._direct.items()):
            if channel in readable:
                try:
                    messages += [from_rank.decode(frame) for frame in channel.receive()]
                except ChannelClosed:  # the node will tell how the process has ended
                    self._close_direct(rank)
        return messages

    def _note_start(self, started: RankStarted) -> None:
        """Note the process of a rank, and send it what has waited, unless it was replaced since."""
        rank = started.rank
        channel = self._receiver.take(started.pid) if started.handed_over else None
        frames = self._answered(rank)
        if rank in self._starting:
            if channel is not None:
                channel.close()
            return
        self._pids[rank] = started.pid
        if channel is not None:
            self._direct[rank] = channel
        elif started.handed_over:
            self.ended[rank] = f"(process {started.pid}) was started, but the channel to it has not arrived"
        for frame in frames:
            self._send_to(rank, frame)

    def _note_end(self, ended: RankEnded) -> None:
        if not ended.started:
            self._answered(ended.rank)
        elif ended.rank in self._starting:  # it was the process before
            return
        self.ended[ended.rank] = ended.why

    def _answered(self, rank: int) -> list[bytes]:
        """Note that the node has answered an order. Return the frames that wait for the rank, if it was the last."""
        start = self._starting[rank]
        start.unanswered -= 1
        if start.unanswered:
            return []
        del self._starting[rank]
        return start.frames

    def _close_direct(self, rank: int) -> None:
        if rank in self._direct:
            self._direct.pop(rank).close()

    def _end_all(self, why: str) -> None:
        self.can_replace = False
        for rank in self.ranks:
            self.ended.setdefault(rank, why)

    def suspended(self, rank: int) -> bool:
        return rank in self._suspended

    def describe(self, rank: int) -> str:
        process = f"process {self._pids[rank]}" if rank in self._pids else "not started"
        return f"{process} on {self._name}"

    def close(self, goodbye: bytes | None) -> None:
        """End the connection. The node ends its ranks, and waits for the next call of the leader."""
        channels = [*self._direct.values(), self._channel]
        if goodbye is not None:
            for channel in channels:
                with contextlib.suppress(ChannelClosed):
                    channel.send(goodbye)
                    channel.flush(_FLUSH_S)
        for channel in channels:
            channel.close()
        self._direct = {}
