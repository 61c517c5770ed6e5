"""The executor `mp`: ranks as processes of this host (`python -m shoal.worker`)."""

import contextlib
import os
import time
from collections.abc import Sequence

from shoal.devices import cpu
from shoal.errors import RankFailed
from shoal.transport.channel import ChannelClosed, wait
from shoal.transport.process import ChildProcess, end_all
from shoal.wire.base import Stop, encode
from shoal.wire.ranks import FromRank, Heartbeat, RankReport, RankSetup, StepResult, ToRank, from_rank

_QUIET_S = 3.0  # after so long without a heartbeat (there are two a second), a process that is stopped has failed
_LOST_S = 60.0  # ... and after so long, a process has failed in any case
_END_S = 1.0


class ProcessLinks:
    """The links to ranks that are child processes."""

    def __init__(self, setups: Sequence[RankSetup], groups: object = None) -> None:
        """Start a process for each setup.

        Args:
            groups: not used. It is for ranks that are threads; processes find each other through a store of their own.
        """
        self.world_size = len(setups)
        # The file through which the ranks find each other. It has no name, and is gone when all processes have ended.
        self._store = os.memfd_create("shoal-store")
        self._closed = False
        self._last_result = -1
        now = time.monotonic()
        self._watched = now
        self._heard = [now] * self.world_size
        self._heartbeats = [Heartbeat(rank, -1, "starting") for rank in range(self.world_size)]
        self._children: list[ChildProcess] = []
        try:
            self._start(setups)
        except BaseException:
            self.close(failed=True)
            raise

    def _start(self, setups: Sequence[RankSetup]) -> None:
        for setup in setups:
            arguments = ["--rank", str(setup.rank), "--size", str(self.world_size), "--store", str(self._store)]
            environment = cpu.pinning_environment(setup.rank_plan.cores) if setup.plan.bind_cores else {}
            self._children.append(ChildProcess("shoal.worker", arguments, environment, [self._store]))

    def send(self, message: ToRank, rank: int | None = None) -> None:
        frame = encode(message)
        for number in range(self.world_size) if rank is None else [rank]:
            with contextlib.suppress(ChannelClosed):  # the next `receive` raises the error, with the reason if known
                self._children[number].channel.send(frame)

    def receive(self, timeout: float) -> list[FromRank]:
        now = time.monotonic()
        if now - self._watched > _QUIET_S:
            # The caller was busy, or this process was stopped: do not hold this time against the ranks.
            self._heard = [now] * self.world_size
        readable = wait([child.channel for child in self._children], timeout)
        self._watched = time.monotonic()
        messages: list[FromRank] = []
        dead = []
        for rank, child in enumerate(self._children):
            if child.channel in readable:
                self._heard[rank] = time.monotonic()
                try:
                    messages += [from_rank.decode(frame) for frame in child.channel.receive()]
                except ChannelClosed:
                    dead.append(rank)
        for message in messages:
            if isinstance(message, Heartbeat):
                self._heartbeats[message.rank] = message
            elif isinstance(message, StepResult):
                self._last_result = message.step
        reports: list[FromRank] = [message for message in messages if isinstance(message, RankReport)]
        if reports:
            return reports  # a report says why a rank has ended
        if dead:
            self._raise_death(dead[0])
        self._check_heartbeats()
        return [message for message in messages if not isinstance(message, Heartbeat)]

    def _check_heartbeats(self) -> None:
        now = time.monotonic()
        for rank, child in enumerate(self._children):
            quiet = now - self._heard[rank]
            if quiet > _LOST_S or (quiet > _QUIET_S and child.stopped()):
                why = "is stopped (SIGSTOP or a debugger)" if child.stopped() else "does not answer"
                raise RankFailed(f"rank {rank} ({self.describe(rank)}) {why}; its last message was {quiet:.1f} s ago")

    def _raise_death(self, rank: int) -> None:
        raise RankFailed(f"rank {rank} ({self.describe(rank)}) {self._children[rank].describe_exit()}")

    def describe(self, rank: int) -> str:
        heartbeat = self._heartbeats[rank]
        last = max(heartbeat.step, self._last_result)  # all ranks have run an answered step; the heartbeat may be older
        step = f"last step {last}" if last >= 0 else "before its first step"
        return f"process {self._children[rank].pid}, {step}, {heartbeat.doing}"

    def close(self, *, failed: bool) -> None:
        if self._closed:
            return
        self._closed = True
        end_all(self._children, None if failed else encode(Stop()), _END_S)
        os.close(self._store)
