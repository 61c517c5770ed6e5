"""A process for one rank: `python -m shoal.worker --fd N --parent PID --store N`.

Its first message says whether it is a rank at once, or a warm spare, which loads everything and waits to become a rank.

The main thread computes. A second thread reads messages, and tells the engine twice a second that the process is alive
and what it is doing, even while the main thread waits for another rank. It ends the process when the engine's process
has ended. When another rank with which it exchanges tensors was replaced, it ends the main thread's wait for the rank
that has died.
"""

import contextlib
import os
import queue
import signal
import threading
import time
from typing import Protocol

import click

from shoal.devices import cpu
from shoal.log import configure_logging
from shoal.process import garbage_collector
from shoal.transport.channel import Channel, ChannelClosed, wait
from shoal.transport.process import die_with_parent
from shoal.wire.base import Ids, Stop, encode, replace_fields
from shoal.wire.credentials import NO_CREDENTIALS, Credentials
from shoal.wire.ranks import Heartbeat, PrepareSpare, RankSetup, SpareReady, TakeRank, ToRank, to_rank

_HEARTBEAT_S = 0.5
_SPARE_WAIT_S = 3600.0  # a spare sends no heartbeats, so that it takes no processor time
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
    inbox: queue.SimpleQueue[ToRank] = queue.SimpleQueue()
    status = _Status()
    threading.Thread(target=_listen, args=(channel, inbox, status), daemon=True, name="listen").start()
    order = status.orders.get()
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
        groups.credentials = status.credentials  # they came before the first message
        if cores := status.take_cores():
            bind_threads(cores)
        answer = rank.answer(message)
        if answer is not None:
            channel.send(encode(answer))
    channel.flush(timeout=1.0)
    os._exit(0)  # nothing must be saved, and the teardown of torch would let the engine wait


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
    """The state of the main thread, as the listening thread sees it."""

    def __init__(self) -> None:
        self.orders: queue.SimpleQueue[PrepareSpare | TakeRank] = queue.SimpleQueue()
        self.place: TakeRank | None = None  # None: it is no rank yet
        self.rank: _Describable | None = None  # None: it is still loading torch
        self.groups: _Abortable | None = None
        self.credentials = NO_CREDENTIALS
        self._position: tuple[object, ...] = ()
        self._moved = 0.0  # when the position was seen first

    def obey(self, order: PrepareSpare | TakeRank) -> None:
        if isinstance(order, TakeRank):
            configure_logging(f"(rank {order.rank}) ")
            self.place = order
        self.orders.put(order)

    def take_cores(self) -> Ids:
        """Return the cores to which the threads are still to be bound."""
        if self.place is None or not self.place.cores:
            return ()
        cores, self.place = self.place.cores, replace_fields(self.place, cores=())
        return cores

    def heartbeat(self, number: int) -> Heartbeat:
        if self.rank is None:
            return Heartbeat(number, -1, "loading torch")
        position, now = self.rank.position, time.monotonic()
        if position != self._position or not position:
            self._position, self._moved = position, now
        return Heartbeat(number, self.rank.last_step, self.rank.doing, now - self._moved, self.rank.waits)


def _listen(channel: Channel, inbox: "queue.SimpleQueue[ToRank]", status: _Status) -> None:
    next_heartbeat = time.monotonic()
    try:
        while True:
            if wait([channel], _SPARE_WAIT_S if status.place is None else next_heartbeat - time.monotonic()):
                for frame in channel.receive():
                    message = to_rank.decode(frame)
                    if isinstance(message, Credentials):
                        status.credentials = message
                        continue
                    if isinstance(message, PrepareSpare | TakeRank):
                        status.obey(message)
                        continue
                    if isinstance(message, RankSetup):
                        _drop_before(message, inbox, status)
                    inbox.put(message)
            if status.place is not None and time.monotonic() >= next_heartbeat:
                if not channel.backlog:  # an idle engine reads nothing, and heartbeats must not pile up
                    channel.send(encode(status.heartbeat(status.place.rank)))
                next_heartbeat = time.monotonic() + _HEARTBEAT_S
    except ChannelClosed:
        os._exit(1)


def _drop_before(setup: RankSetup, inbox: "queue.SimpleQueue[ToRank]", status: _Status) -> None:
    """Drop all messages before a setup, and have the main thread end what it is doing for them."""
    with contextlib.suppress(queue.Empty):
        while True:
            inbox.get_nowait()
    if status.groups is not None:
        status.groups.abort_before(setup.incarnation)


if __name__ == "__main__":
    main()
