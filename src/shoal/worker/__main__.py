"""A process for one rank: `python -m shoal.worker --fd N --parent PID --store N`.

Its first order says whether it is a rank at once, or a warm spare, which loads everything and waits to become a rank.

The main thread reads messages and computes. A second thread tells the engine twice a second that the process is alive
and what it is doing, even while the main thread waits for another rank. It also looks after the channel while the main
thread computes: it ends the process when the engine's process has ended, and when another rank with which this one
exchanges tensors was replaced, it ends the main thread's wait for the rank that has died.
"""

import os
import signal
import threading
import time
from typing import Protocol

import click

from shoal.devices import cpu
from shoal.log import configure_logging
from shoal.process import garbage_collector
from shoal.transport.channel import Channel, ChannelClosed
from shoal.transport.process import die_with_parent
from shoal.wire.base import Stop, encode
from shoal.wire.credentials import NO_CREDENTIALS, Credentials
from shoal.wire.ranks import Heartbeat, PrepareSpare, RankSetup, SpareReady, TakeRank, ToRankProcess
from shoal.worker.inbox import Inbox

_HEARTBEAT_S = 0.5
_NICE = 5  # of the thread that loads a spare: it gets a third of what a rank gets on the same core


@click.command()
@click.option("--fd", type=int, required=True)
@click.option("--parent", type=int, required=True)
@click.option("--store", type=int, required=True)
def main(fd: int, parent: int, store: int) -> None:
    die_with_parent(parent)
    garbage_collector.collect_rarely()
    for each in (signal.SIGINT, signal.SIGTERM):  # they may reach the whole process group; the engine ends its ranks
        signal.signal(each, signal.SIG_IGN)
    configure_logging("(spare) ")
    channel = Channel.from_fd(fd)
    status = _Status()
    inbox = Inbox(channel, status.note)
    threading.Thread(target=_watch, args=(channel, inbox, status), daemon=True, name="watch").start()
    try:
        _run(channel, inbox, status, store)
        channel.flush(timeout=1.0)
    except ChannelClosed:
        os._exit(1)
    os._exit(0)  # nothing must be saved, and the teardown of torch would let the engine wait


def _run(channel: Channel, inbox: Inbox, status: "_Status", store: int) -> None:
    """Obey the first order, and then handle messages until one says to stop."""
    while not isinstance(order := inbox.get(), PrepareSpare | TakeRank):
        pass
    if isinstance(order, PrepareSpare):
        _prepare_aside(order)

    from shoal.worker.process_groups import ProcessGroups  # loads torch, while the other thread sends heartbeats
    from shoal.worker.rank import Rank
    from shoal.worker.thread_binding import bind_threads

    garbage_collector.freeze_imports()
    status.groups = groups = ProcessGroups(store)
    status.rank = rank = Rank(groups)
    if status.place is None:
        channel.send(encode(SpareReady(cpu.anonymous_memory())))
    while not isinstance(message := inbox.get(), Stop):
        match message:
            case TakeRank():
                if message.cores:
                    bind_threads(message.cores)
            case Credentials() | PrepareSpare():
                pass
            case _:
                groups.credentials = status.credentials
                answer = rank.answer(message)
                if answer is not None:
                    channel.send(encode(answer))


def _prepare_aside(order: PrepareSpare) -> None:
    """Load everything that a rank needs, and leave most processor time to ranks that compute.

    A thread of a low priority does it: this thread could not raise its priority again.
    """
    thread = threading.Thread(target=_prepare, args=(order,), name="prepare")
    thread.start()
    thread.join()


def _prepare(order: PrepareSpare) -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
    from shoal.worker.spare import prepare  # loads torch

    prepare(order)


class _Describable(Protocol):
    @property
    def last_step(self) -> int: ...

    @property
    def doing(self) -> str: ...

    @property
    def position(self) -> tuple[object, ...]: ...

    @property
    def waits(self) -> bool: ...


class _Abortable(Protocol):
    def abort_before(self, incarnation: int) -> None: ...


class _Status:
    """The state of a rank's process, which both of its threads read."""

    def __init__(self) -> None:
        self.place: TakeRank | None = None  # None: it is no rank yet
        self.rank: _Describable | None = None  # None: it is still loading torch
        self.groups: _Abortable | None = None
        self.credentials = NO_CREDENTIALS
        self._position: tuple[object, ...] = ()
        self._moved = 0.0  # when the position was seen first

    def note(self, message: ToRankProcess) -> None:
        """Do at once what a message asks of the process, whatever its main thread does."""
        match message:
            case Credentials():
                self.credentials = message
            case TakeRank():
                configure_logging(f"(rank {message.rank}) ")
                self.place = message
            case RankSetup() if self.groups is not None:
                self.groups.abort_before(message.incarnation)

    def heartbeat(self, number: int) -> Heartbeat:
        if self.rank is None:
            return Heartbeat(number, -1, "loading torch")
        position, now = self.rank.position, time.monotonic()
        if position != self._position or not position:
            self._position, self._moved = position, now
        return Heartbeat(number, self.rank.last_step, self.rank.doing, now - self._moved, self.rank.waits)


def _watch(channel: Channel, inbox: Inbox, status: _Status) -> None:
    """Send heartbeats, unless the process is a spare, and look after the channel in between."""
    try:
        while True:
            if status.place is not None and not channel.backlog:  # an idle engine reads nothing: they must not pile up
                channel.send(encode(status.heartbeat(status.place.rank)))
            inbox.watch(_HEARTBEAT_S)
    except ChannelClosed:
        os._exit(1)


if __name__ == "__main__":
    main()
