"""The ranks of one node, as the node itself runs them: for an engine on another host."""

import contextlib
from collections.abc import Sequence

from shoal.addresses import Address
from shoal.executors.fork_server import ForkedRank
from shoal.executors.rank_processes import RankProcesses
from shoal.log import get_logger
from shoal.transport.channel import Channel, ChannelClosed
from shoal.transport.connecting import connect
from shoal.transport.handover import hand_over
from shoal.transport.process import ExitWatch, end_all
from shoal.wire.base import Stop, WireError, encode
from shoal.wire.credentials import Credentials
from shoal.wire.nodes import (
    ENGINE_DOOR,
    ENGINE_START,
    EngineCall,
    ForAllRanks,
    ForRank,
    KeepSpares,
    RankEnded,
    RankStarted,
    RankSuspended,
    StartRank,
    ToNode,
    to_node,
)

log = get_logger("node")

_END_S = 1.0


class NodeAgent:
    """Starts the ranks that an engine asks for, and passes frames on between the engine and each of them.

    It decodes no frame of a rank. If the engine is on this host, it gets the channels to the ranks, so that no frame
    takes the way through this process. The owner waits for `channels`, unless `has_frame`, and calls `tick` at least
    once a second.
    """

    def __init__(self, call: EngineCall, credentials: Credentials) -> None:
        """Connect to the engine that calls. The ranks get the same credentials.

        Raises:
            ConfigError: it cannot be reached in time, or refuses this node.
        """
        self._engine = connect(
            Address.parse(call.address),
            credentials,
            room=ENGINE_DOOR,
            rank=call.number,
            size=call.size,
            agreement={ENGINE_START: call.start},
            timeout=call.within_s,
        )
        self._processes = RankProcesses(credentials)
        self._children: dict[int, ForkedRank] = {}
        self._starting: dict[int, str] = {}  # ranks that are still to be forked -> who receives their channels
        self._exits: dict[int, ExitWatch] = {}  # of the ranks whose channels were handed over to the engine
        self._suspended: set[int] = set()

    @property
    def channels(self) -> list[Channel | ExitWatch]:
        forked = [(rank, child) for rank, child in self._children.items() if rank not in self._starting]
        ranks = [self._exits.get(rank, child.channel) for rank, child in forked]
        return [self._engine, *ranks, *self._processes.channels]

    @property
    def has_frame(self) -> bool:
        """True if the engine has sent something that was read from its connection together with earlier messages."""
        return self._engine.has_frame

    def tick(self, readable: Sequence[object]) -> bool:
        """Handle what has arrived, and report processes that have ended or were stopped.

        Returns:
            False if the engine has ended the ranks or has gone. Then `close` must be called.
        """
        try:
            if self._engine in readable or self._engine.has_frame:
                for frame in self._engine.receive():
                    if not self._obey(to_node.decode(frame)):
                        return False
            for heartbeat in self._processes.tick(readable):
                self._engine.send(encode(heartbeat))
            for rank, child in list(self._children.items()):
                if rank in self._starting:
                    self._tell_start(rank, child)
                else:
                    self._read(rank, child, self._exits.get(rank, child.channel) in readable)
        except ChannelClosed:
            log.info("the engine has gone")
            return False
        except WireError as error:
            log.error("the engine sent a message that cannot be read: %s", error)
            return False
        return True

    def _obey(self, message: ToNode) -> bool:
        match message:
            case ForAllRanks():
                for child in self._children.values():
                    child.say(message.frame)
            case ForRank():
                if message.rank in self._children:
                    self._children[message.rank].say(message.frame)
            case StartRank():
                self._start(message)
            case KeepSpares():
                self._processes.keep_spares(message.count)
            case Stop():
                self._processes.close()
                self._end_all(encode(message), _END_S)
                return False
        return True

    def _start(self, order: StartRank) -> None:
        """Have a process be a rank. If the rank has a process that still runs, it is killed first."""
        former = self._children.get(order.rank)
        if former is not None:
            if order.rank in self._starting:  # the engine awaits an answer to each order
                self._engine.send(encode(RankStarted(order.rank, former.pid, handed_over=False)))
            self._forget(order.rank)
            former.kill()
        try:
            self._children[order.rank] = self._processes.start(order)
        except OSError as error:  # no memory for a process, or no file descriptor left
            self._engine.send(encode(RankEnded(order.rank, f"cannot be started: {error}", started=False)))
            return
        self._starting[order.rank] = order.receiver

    def _tell_start(self, rank: int, child: ForkedRank) -> None:
        """Tell the engine that the process of a rank was forked, or why not."""
        if child.pid:
            receiver = self._starting.pop(rank)
            handed_over = bool(receiver) and self._hand_over(rank, child, receiver)
            self._engine.send(encode(RankStarted(rank, child.pid, handed_over)))
        elif child.exit_code is not None:
            self._forget(rank)
            self._engine.send(encode(RankEnded(rank, child.describe_exit(), started=False)))
            child.kill()

    def _hand_over(self, rank: int, child: ForkedRank, receiver: str) -> bool:
        """Give the channel of a process to the engine, if it is on this host. Return whether it has the channel."""
        try:
            watch = ExitWatch(child.pid)
        except OSError:
            return False
        if not hand_over(child.channel, child.pid, receiver):
            watch.close()
            return False
        self._exits[rank] = watch
        return True

    def _forget(self, rank: int) -> None:
        del self._children[rank]
        self._starting.pop(rank, None)
        self._suspended.discard(rank)
        if rank in self._exits:
            self._exits.pop(rank).close()

    def _read(self, rank: int, child: ForkedRank, readable: bool) -> None:
        """Pass on what a rank has sent, or that its process has ended or was stopped."""
        if self._has_ended(rank, child, readable):
            self._forget(rank)
            self._engine.send(encode(RankEnded(rank, child.describe_exit(), started=True)))
            child.kill()
            return
        if not readable and rank not in self._suspended and child.stopped():
            self._suspended.add(rank)
            self._engine.send(encode(RankSuspended(rank)))

    def _has_ended(self, rank: int, child: ForkedRank, readable: bool) -> bool:
        """Pass on what a rank has sent. Return whether its process has ended."""
        if rank in self._exits:
            return readable
        try:
            for frame in child.channel.receive() if readable else ():
                self._engine.send(frame)
        except ChannelClosed:
            return True
        return False

    def close(self) -> None:
        """End all ranks, and the connection to the engine. Idempotent, never raises."""
        self._processes.close()
        self._end_all(None, 0)
        with contextlib.suppress(ChannelClosed):
            self._engine.flush(0)
        self._engine.close()

    def _end_all(self, goodbye: bytes | None, timeout: float) -> None:
        """End the ranks as `end_all` does. Those whose channels the engine has get its goodbye from there."""
        end_all(list(self._children.values()), goodbye, timeout)
        for rank in list(self._children):
            self._forget(rank)
