"""Processes for ranks on this host (`python -m shoal.worker`): new ones, and warm spares, which have loaded everything.

A process is told by its first message whether it is a rank or a warm spare. A spare becomes a rank by a later message.
"""

import time
from collections import deque
from collections.abc import Container
from dataclasses import dataclass

from shoal import env
from shoal.devices import cpu, network
from shoal.log import get_logger
from shoal.transport.channel import Channel, ChannelClosed, wait
from shoal.transport.process import ChildProcess, end_all
from shoal.values import format_bytes
from shoal.wire.base import Ids, encode
from shoal.wire.credentials import Credentials
from shoal.wire.nodes import KeepSpares, RankEnvironment, StartRank
from shoal.wire.ranks import SpareReady, TakeRank, from_rank

log = get_logger("spares")

NO_STORE = -1  # instead of a file descriptor: the ranks find each other elsewhere
_SETTLE_S = 2.0  # how long after the start of a rank no spare is started: requests compute their tokens again
_MOST_ENDS = 3  # spares that may end by themselves ...
_PERIOD_S = 3600.0  # ... within this time; with one more, none is started any more


@dataclass(slots=True)
class _Spare:
    """A warm spare."""

    process: ChildProcess
    ready: bool = False  # it has loaded everything


class RankProcesses:
    """Starts processes for ranks, and keeps warm spares for them. The owner waits for `channels`, and calls `tick`."""

    def __init__(self, credentials: Credentials, store: int = NO_STORE) -> None:
        """Start nothing yet.

        Args:
            credentials: of this host, for the places where ranks of several hosts find each other.
            store: the descriptor of the file through which ranks of one host find each other.
        """
        self._credentials = credentials
        self._store = store
        self._wanted: KeepSpares | None = None  # None: no spare is to be started now
        self._spares: list[_Spare] = []
        self._last_start = float("-inf")  # when a rank was started last
        self._ends: deque[float] = deque(maxlen=_MOST_ENDS + 1)  # when spares have ended by themselves

    def start(self, order: StartRank) -> ChildProcess:
        """Return a process that is the rank: a warm spare that is ready, or else a new process.

        A new process is faster than a spare that still loads, as spares load with a low priority. No spare is started
        until the next `keep_spares`, because it would take cores from the ranks that start.

        Raises:
            OSError: there is no memory for a process, or no file descriptor left.
        """
        self._wanted = None
        self._last_start = time.monotonic()
        spare = self._take_spare()
        if spare is not None:
            log.info("rank %d: the warm spare, process %d, takes over", order.rank, spare.pid)
            spare.say(encode(TakeRank(order.rank, order.cores)))
            return spare
        child = self._start_process(order.environment, order.cores)
        child.say(encode(TakeRank(order.rank)))
        return child

    def _take_spare(self) -> ChildProcess | None:
        """Return the process of a spare that is ready, if there is one. Spares that have ended or hang are removed."""
        self.tick(wait(self.channels, 0))
        for spare in [each for each in self._spares if each.ready]:
            self._spares.remove(spare)
            if spare.process.exit_code is None and not spare.process.stopped():
                return spare.process
            spare.process.kill()
        return None

    def _start_process(self, environment: RankEnvironment, cores: Ids = ()) -> ChildProcess:
        variables = env.not_set_here(environment.variables)
        if environment.address:
            variables |= network.socket_environment(environment.address)
        if cores:
            variables |= cpu.pinning_environment(cores)
        passed = [] if self._store == NO_STORE else [self._store]
        child = ChildProcess("shoal.worker", ["--store", str(self._store)], variables, passed)
        child.say(encode(self._credentials))
        return child

    def keep_spares(self, order: KeepSpares) -> None:
        """Start the spares that are missing, as `tick` is called, and those that end from now on. Never raises."""
        self._wanted = order
        self._fill()

    def _fill(self) -> None:
        if time.monotonic() - self._last_start < _SETTLE_S:
            return
        while self._wanted is not None and len(self._spares) < self._wanted.count:
            try:
                process = self._start_process(self._wanted.environment)
            except OSError as error:
                log.warning("a warm spare cannot be started: %s", error)
                self._wanted = None
                return
            self._spares.append(_Spare(process))
            process.say(encode(self._wanted.preparation))

    @property
    def channels(self) -> list[Channel]:
        """The channels to the spares."""
        return [spare.process.channel for spare in self._spares]

    def tick(self, readable: Container[object]) -> None:
        """Take in what spares have sent, and start those again that have ended."""
        for spare in [each for each in self._spares if each.process.channel in readable]:
            try:
                for message in map(from_rank.decode, spare.process.channel.receive()):
                    if isinstance(message, SpareReady):
                        spare.ready = True
                        memory = format_bytes(message.memory)
                        log.info("a warm spare, process %d, is ready and takes %s of memory", spare.process.pid, memory)
            except ChannelClosed:
                self._spares.remove(spare)
                self._note_end(spare.process)
        self._fill()

    def _note_end(self, process: ChildProcess) -> None:
        how = process.describe_exit()
        process.kill()
        log.debug("a warm spare, process %d, %s", process.pid, how)
        self._ends.append(time.monotonic())
        if len(self._ends) > _MOST_ENDS and self._ends[-1] - self._ends[0] < _PERIOD_S:
            log.warning("%d warm spares have ended, the last one %s: no more are started now", len(self._ends), how)
            self._wanted = None

    def close(self) -> None:
        """End the spares. Idempotent, never raises."""
        self._wanted = None
        end_all([spare.process for spare in self._spares], None, 0)
        self._spares = []
