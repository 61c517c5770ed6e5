"""Processes for ranks on this host: a fork server forks them, and stays as the warm spare if one is wanted."""

import time
from collections import deque
from collections.abc import Container

from shoal import env
from shoal.devices import network
from shoal.executors.fork_server import ForkedRank, ForkServer
from shoal.log import get_logger
from shoal.transport.channel import Channel, ChannelClosed, wait
from shoal.values import format_bytes
from shoal.wire.base import encode, replace_fields
from shoal.wire.credentials import Credentials
from shoal.wire.nodes import RankEnvironment, StartRank
from shoal.wire.ranks import Heartbeat, Preparation, TakeRank

log = get_logger("spares")

NO_STORE = -1  # instead of a file descriptor: the ranks find each other elsewhere
_SETTLE_S = 2.0  # how long after the start of a rank no spare is started: requests compute their tokens again
_MOST_ENDS = 3  # spares that may end by themselves ...
_PERIOD_S = 3600.0  # ... within this time; with one more, none is started any more


class RankProcesses:
    """Starts processes for ranks, and keeps a warm spare for them. The owner waits for `channels`, and calls `tick`."""

    def __init__(self, credentials: Credentials, store: int = NO_STORE) -> None:
        """Start nothing yet.

        Args:
            credentials: of this host, for the places where ranks of several hosts find each other.
            store: the descriptor of the file through which ranks of one host find each other.
        """
        self._credentials = credentials
        self._store = None if store == NO_STORE else store
        self._server: ForkServer | None = None
        self._keeps_spare = False  # the fork server is the warm spare, and is started again if it ends
        self._told = False  # the log says that the spare is ready
        self._last_order: StartRank | None = None
        self._last_start = float("-inf")  # when a rank was started last
        self._ends: deque[float] = deque(maxlen=_MOST_ENDS + 1)  # when spares have ended by themselves

    def start(self, order: StartRank) -> ForkedRank:
        """Return the process that is to be the rank. It is forked at once if there is a warm spare that is ready.

        A new fork server is faster than a spare that still loads, as spares load with a low priority. No spare is
        started until the next `keep_spares`, because it would take cores from the ranks that start.

        Raises:
            OSError: there is no memory for a process, or no file descriptor left.
        """
        was_spare, self._keeps_spare = self._keeps_spare, False
        self._last_start, self._last_order = time.monotonic(), order
        self._receive(wait(self.channels, 0))
        server = self._server
        if server is None or not _can_fork(server):
            server = self._start_server(order.preparation, order.environment)
        elif was_spare:
            log.info("rank %d: the warm spare, process %d, forks its new process", order.rank, server.process.pid)
        rank = server.fork(TakeRank(order.rank, order.cores))
        rank.say(encode(self._credentials))
        return rank

    def _start_server(self, preparation: Preparation, environment: RankEnvironment) -> ForkServer:
        """Start a fork server, instead of the one that there may be."""
        self._end_server()
        variables = env.not_set_here(environment.variables)
        if environment.address:
            variables |= network.socket_environment(environment.address)
        self._told = False
        self._server = ForkServer(preparation, variables, self._store)
        return self._server

    def _end_server(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    def keep_spares(self, count: int) -> None:
        """Keep a warm spare from now on, unless `count` is 0: start it now or as `tick` is called. Never raises."""
        self._keeps_spare = count > 0
        if not self._keeps_spare and self._server is not None and not self._server.is_busy:
            self._end_server()
        self._keep_spare()

    def _keep_spare(self) -> None:
        """Start a warm spare if one is missing, and say when it is ready."""
        if not self._keeps_spare or self._last_order is None:
            return
        if self._server is None:
            if time.monotonic() - self._last_start < _SETTLE_S:
                return
            preparation = replace_fields(self._last_order.preparation, low_priority=True)
            try:
                self._start_server(preparation, self._last_order.environment)
            except OSError as error:
                log.warning("a warm spare cannot be started: %s", error)
                self._keeps_spare = False
        elif self._server.memory is not None and not self._told:
            self._told = True
            pid, memory = self._server.process.pid, format_bytes(self._server.memory)
            log.info("a warm spare, process %d, is ready and takes %s of memory", pid, memory)

    @property
    def channels(self) -> list[Channel]:
        """The channel to the fork server, if there is one."""
        return [] if self._server is None else [self._server.channel]

    def tick(self, readable: Container[object]) -> list[Heartbeat]:
        """Take in what the fork server has told, and start the spare again if it has ended.

        Returns:
            Heartbeats of ranks whose processes are still to be forked.
        """
        heartbeats = self._receive(readable)
        self._keep_spare()
        return heartbeats

    def _receive(self, readable: Container[object]) -> list[Heartbeat]:
        if self._server is None or self._server.channel not in readable:
            return []
        try:
            return self._server.receive()
        except ChannelClosed:
            self._note_end(self._server)
            return []

    def _note_end(self, server: ForkServer) -> None:
        how = server.process.describe_exit()
        self._end_server()
        if not self._keeps_spare:
            return  # the ranks that it should have forked say so
        log.debug("a warm spare, process %d, %s", server.process.pid, how)
        self._ends.append(time.monotonic())
        if len(self._ends) > _MOST_ENDS and self._ends[-1] - self._ends[0] < _PERIOD_S:
            log.warning("%d warm spares have ended, the last one %s: no more are started now", len(self._ends), how)
            self._keeps_spare = False

    def close(self) -> None:
        """End the fork server. Idempotent, never raises."""
        self._keeps_spare = False
        self._end_server()


def _can_fork(server: ForkServer) -> bool:
    """Tell whether a fork server forks at once, or still loads as fast as a new one would."""
    if server.process.exit_code is not None or server.process.stopped():
        return False
    return not (server.loads and server.low_priority)
