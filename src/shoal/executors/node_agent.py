"""The ranks of one node, as the node itself runs them: for an engine on another host."""

import contextlib
from collections.abc import Sequence

from shoal.addresses import Address
from shoal.executors.local_ranks import start_rank
from shoal.log import get_logger
from shoal.transport.channel import Channel, ChannelClosed
from shoal.transport.connecting import connect
from shoal.transport.process import ChildProcess, end_all
from shoal.wire.base import Stop, WireError, encode
from shoal.wire.credentials import Credentials
from shoal.wire.nodes import (
    ENGINE_DOOR,
    ENGINE_START,
    EngineCall,
    ForAllRanks,
    ForRank,
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

    It decodes no frame of a rank. The owner waits for `channels`, unless `has_frame`, and calls `tick` at least once a
    second.
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
        self._credentials = credentials
        self._children: dict[int, ChildProcess] = {}
        self._suspended: set[int] = set()

    @property
    def channels(self) -> list[Channel]:
        return [self._engine, *(child.channel for child in self._children.values())]

    @property
    def has_frame(self) -> bool:
        """True if the engine has sent something that was read from its connection together with earlier messages."""
        return self._engine.has_frame

    def tick(self, readable: Sequence[Channel]) -> bool:
        """Handle what has arrived, and report processes that have ended or were stopped.

        Returns:
            False if the engine has ended the ranks or has gone. Then `close` must be called.
        """
        try:
            if self._engine in readable or self._engine.has_frame:
                for frame in self._engine.receive():
                    if not self._obey(to_node.decode(frame)):
                        return False
            for rank, child in list(self._children.items()):
                self._read(rank, child, child.channel in readable)
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
            case Stop():
                end_all(list(self._children.values()), encode(message), _END_S)
                self._children = {}
                return False
        return True

    def _start(self, order: StartRank) -> None:
        """Start the process of a rank. If the rank has one that still runs, it is killed first."""
        former = self._children.pop(order.rank, None)
        if former is not None:
            former.kill()
        self._suspended.discard(order.rank)
        try:
            child = self._children[order.rank] = start_rank(order, self._credentials)
        except OSError as error:  # no memory for a process, or no file descriptor left
            self._engine.send(encode(RankEnded(order.rank, f"cannot be started: {error}")))
            return
        self._engine.send(encode(RankStarted(order.rank, child.pid)))

    def _read(self, rank: int, child: ChildProcess, readable: bool) -> None:
        """Pass on what a rank has sent, or that its process has ended or was stopped."""
        try:
            for frame in child.channel.receive() if readable else ():
                self._engine.send(frame)
        except ChannelClosed:
            del self._children[rank]
            self._engine.send(encode(RankEnded(rank, child.describe_exit())))
            child.kill()
            return
        if not readable and rank not in self._suspended and child.stopped():
            self._suspended.add(rank)
            self._engine.send(encode(RankSuspended(rank)))

    def close(self) -> None:
        """End all ranks, and the connection to the engine. Idempotent, never raises."""
        end_all(list(self._children.values()), None, 0)
        self._children = {}
        with contextlib.suppress(ChannelClosed):
            self._engine.flush(0)
        self._engine.close()
