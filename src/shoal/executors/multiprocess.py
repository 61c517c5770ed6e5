"""The executor `mp`: ranks as processes, of this host and of other nodes."""

import os
import time
from collections.abc import Container, Mapping, Sequence
from typing import NoReturn

from shoal.errors import RankFailed, RanksDied
from shoal.executors.local_ranks import LocalRanks
from shoal.executors.node_ranks import NodeListener, NodeRanks
from shoal.executors.rank_part import RankPart
from shoal.executors.rank_processes import NO_STORE
from shoal.transport.channel import Channel, wait
from shoal.wire.base import Stop, encode
from shoal.wire.ranks import FromRank, Heartbeat, RankReport, RankSetup, StepResult, ToRank

_QUIET_S = 3.0  # after so long without a heartbeat (there are two a second), a process that is stopped has failed
_LOST_S = 60.0  # ... and after so long, a process has failed in any case
_NODE_TIMEOUT_S = 60.0  # nodes were there when the replica was planned, so they come at once


class ProcessLinks:
    """The links to ranks that are processes: children of this process, and those that other nodes start for it."""

    def __init__(
        self, setups: Sequence[RankSetup], groups: object = None, listener: NodeListener | None = None
    ) -> None:
        """Start a process for each setup.

        Args:
            groups: not used. It is for ranks that are threads; processes find each other through a store of their own.
            listener: the place where the nodes of the replica come; it is closed with these links. None: all ranks run
                on this host.

        Raises:
            RankFailed: a node does not come.
        """
        self.world_size = len(setups)
        # The file through which ranks of one host find each other. It has no name, and is gone when all processes have
        # ended.
        self._store = os.memfd_create("shoal-store") if listener is None else NO_STORE
        self._listener = listener
        self._closed = False
        self._finds_hangs = all(setup.rank_plan.device == "cpu" for setup in setups)
        self._last_result = -1
        now = time.monotonic()
        self._watched = now
        self._heard = [now] * self.world_size
        self._heartbeats = [Heartbeat(rank, -1, "starting") for rank in range(self.world_size)]
        self._parts: list[RankPart] = []
        self._part_of: dict[int, RankPart] = {}
        try:
            self._start_parts(setups)
        except BaseException:
            self.close(failed=True)
            raise

    def _start_parts(self, setups: Sequence[RankSetup]) -> None:
        """Start the ranks of this host first, so that they load while the nodes come."""
        elsewhere = self._listener.nodes if self._listener is not None else {}
        here = [setup for setup in setups if setup.rank_plan.node not in elsewhere]
        self._start_part(LocalRanks(here, self._store))
        if self._listener is None:
            return
        channels = self._listener.gather(_NODE_TIMEOUT_S)
        for number, node in elsewhere.items():
            theirs = [setup for setup in setups if setup.rank_plan.node == number]
            self._start_part(NodeRanks(node, channels[number], self._listener.receiver, theirs))

    def _start_part(self, part: RankPart) -> None:
        self._parts.append(part)
        part.start()
        self._part_of |= dict.fromkeys(part.ranks, part)

    def send(self, message: ToRank, rank: int | None = None) -> None:
        frame = encode(message)
        if rank is not None:
            self._part_of[rank].send(frame, rank)
            return
        for part in self._parts:
            part.send(frame)

    def receive(self, timeout: float) -> list[FromRank]:
        now = time.monotonic()
        if now - self._watched > _QUIET_S:
            # The caller was busy, or this process was stopped: do not hold this time against the ranks.
            self._heard = [now] * self.world_size
        readable = wait([channel for part in self._parts for channel in part.channels], timeout)
        self._watched = time.monotonic()
        messages = [message for part in self._parts for message in self._receive_from(part, readable)]
        if not any(isinstance(message, RankReport) for message in messages):  # a report says why a rank has ended
            dead = {rank: how for part in self._parts for rank, how in part.ended.items()} or self._silent()
            if dead:
                self._raise_dead(dead)
        return [message for message in messages if not isinstance(message, Heartbeat)]

    def _raise_dead(self, dead: Mapping[int, str]) -> NoReturn:
        """Raise the error of ranks that have died, which are given with how they did."""
        message = "; ".join(f"rank {rank} ({self.describe(rank)}) {how}" for rank, how in dead.items())
        if all(self._part_of[rank].can_replace for rank in dead):
            raise RanksDied(message, tuple(dead))
        raise RankFailed(message)

    def _receive_from(self, part: RankPart, readable: Container[Channel]) -> list[FromRank]:
        messages = []
        for message in part.receive(readable):
            match message:
                case Heartbeat():
                    self._heartbeats[message.rank] = message
                    self._heard[message.rank] = time.monotonic()
                case StepResult():
                    self._last_result = message.step
            messages.append(message)
        return messages

    def _silent(self) -> dict[int, str]:
        """Return the ranks that send no heartbeats any more, and why."""
        now, found = time.monotonic(), {}
        for rank, part in self._part_of.items():
            quiet = now - self._heard[rank]
            if quiet > _LOST_S or (quiet > _QUIET_S and part.suspended(rank)):
                why = "is stopped (SIGSTOP or a debugger)" if part.suspended(rank) else "does not answer"
                found[rank] = f"{why}; its last message was {quiet:.1f} s ago"
        return found

    def stuck(self, seconds: float, step: int) -> list[int]:
        """Return the ranks that hang in a step, by what they have told. On a GPU it cannot be seen that they wait."""
        now, found = time.monotonic(), []
        for rank, heartbeat in enumerate(self._heartbeats):
            quiet = now - self._heard[rank]
            still = heartbeat.still_s + quiet
            told = heartbeat.step < step and heartbeat.still_s > 0 and not heartbeat.waits and still > seconds
            if self._finds_hangs and (told or quiet > max(seconds, _QUIET_S)):
                found.append(rank)
        return found

    def replace(self, ranks: Sequence[int]) -> None:
        try:
            for rank in ranks:
                self._part_of[rank].replace(rank)
                self._heartbeats[rank] = Heartbeat(rank, -1, "starting")
        except OSError as error:
            raise RankFailed(f"another process for rank {rank} cannot be started: {error}") from None
        # Time in which this process waited for the end of an old one must not be held against the ranks.
        self._heard = [time.monotonic()] * self.world_size

    def keep_spares(self) -> None:
        for part in self._parts:
            part.keep_spares()

    def describe(self, rank: int) -> str:
        heartbeat = self._heartbeats[rank]
        last = max(heartbeat.step, self._last_result)  # all ranks have run an answered step; the heartbeat may be older
        step = f"last step {last}" if last >= 0 else "before its first step"
        return f"{self._part_of[rank].describe(rank)}, {step}, {heartbeat.doing}"

    def close(self, *, failed: bool) -> None:
        if self._closed:
            return
        self._closed = True
        for part in self._parts:
            part.close(None if failed else encode(Stop()))
        if self._listener is not None:
            self._listener.close()
        if self._store != NO_STORE:
            os.close(self._store)
