"""A process with one rank: `python -m shoal.worker --fd N --parent PID --store N`.

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

from shoal.log import configure_logging
from shoal.process import garbage_collector
from shoal.transport.channel import Channel, ChannelClosed, wait
from shoal.transport.process import die_with_parent
from shoal.wire.base import Stop, encode
from shoal.wire.credentials import NO_CREDENTIALS, Credentials
from shoal.wire.ranks import Heartbeat, RankSetup, ToRank, to_rank

_HEARTBEAT_S = 0.5


@click.command()
@click.option("--fd", type=int, required=True)
@click.option("--parent", type=int, required=True)
@click.option("--rank", "number", type=int, required=True)
@click.option("--store", type=int, required=True)
def main(fd: int, parent: int, number: int, store: int) -> None:
    die_with_parent(parent)
    for each in (signal.SIGINT, signal.SIGTERM):  # they may reach the whole process group; the engine ends its ranks
        signal.signal(each, signal.SIG_IGN)
    configure_logging(f"(rank {number}) ")
    channel = Channel.from_fd(fd)
    inbox: queue.SimpleQueue[ToRank] = queue.SimpleQueue()
    status = _Status(number)
    threading.Thread(target=_listen, args=(channel, inbox, status), daemon=True, name="listen").start()

    from shoal.worker.process_groups import ProcessGroups  # loads torch, while the other thread sends heartbeats
    from shoal.worker.rank import Rank

    garbage_collector.freeze()
    status.groups = groups = ProcessGroups(store)
    status.rank = rank = Rank(groups)
    while not isinstance(message := inbox.get(), Stop):
        groups.credentials = status.credentials  # they came before the first message
        answer = rank.answer(message)
        if answer is not None:
            channel.send(encode(answer))
    channel.flush(timeout=1.0)
    os._exit(0)  # nothing must be saved, and the teardown of torch would let the engine wait


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

    def __init__(self, number: int) -> None:
        self.number = number
        self.rank: _Describable | None = None  # None: it is still loading torch
        self.groups: _Abortable | None = None
        self.credentials = NO_CREDENTIALS
        self._position: tuple[object, ...] = ()
        self._moved = 0.0  # when the position was seen first

    def heartbeat(self) -> Heartbeat:
        if self.rank is None:
            return Heartbeat(self.number, -1, "loading torch")
        position, now = self.rank.position, time.monotonic()
        if position != self._position or not position:
            self._position, self._moved = position, now
        return Heartbeat(self.number, self.rank.last_step, self.rank.doing, now - self._moved, self.rank.waits)


def _listen(channel: Channel, inbox: "queue.SimpleQueue[ToRank]", status: _Status) -> None:
    next_heartbeat = time.monotonic()
    try:
        while True:
            if wait([channel], next_heartbeat - time.monotonic()):
                for frame in channel.receive():
                    message = to_rank.decode(frame)
                    if isinstance(message, Credentials):
                        status.credentials = message
                        continue
                    if isinstance(message, RankSetup):
                        _drop_before(message, inbox, status)
                    inbox.put(message)
            if time.monotonic() >= next_heartbeat:
                if not channel.backlog:  # an idle engine reads nothing, and heartbeats must not pile up
                    channel.send(encode(status.heartbeat()))
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
