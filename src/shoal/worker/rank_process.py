"""The process of one rank, which a fork server has forked.

The main thread reads messages and computes. A second thread tells the engine twice a second that the process is alive
and what it is doing, even while the main thread waits for another rank. It also looks after the channel while the main
thread computes: it ends the process when the engine's process has ended, and when another rank with which this one
exchanges tensors was replaced, it ends the main thread's wait for the rank that has died.
"""

import os
import threading
import time
from typing import NoReturn

from shoal.log import configure_logging
from shoal.transport.channel import Channel, ChannelClosed
from shoal.wire.base import Stop, encode
from shoal.wire.credentials import NO_CREDENTIALS, Credentials
from shoal.wire.ranks import Heartbeat, RankSetup, TakeRank, ToRankProcess
from shoal.worker.inbox import Inbox
from shoal.worker.process_groups import ProcessGroups
from shoal.worker.rank import Rank
from shoal.worker.thread_binding import bind_threads

_HEARTBEAT_S = 0.5


def run(order: TakeRank, channel: Channel, store: int) -> NoReturn:
    """Be the rank until a message says to stop, or the channel ends; then end the process.

    Args:
        store: the descriptor of the file through which ranks of one host find each other, or -1.
    """
    configure_logging(f"(rank {order.rank}) ")
    process = _RankProcess(order.rank, channel, store)
    threading.Thread(target=process.watch, daemon=True, name="watch").start()
    if order.cores:
        bind_threads(order.cores)
    try:
        process.answer_messages()
        channel.flush(timeout=1.0)
    except ChannelClosed:
        os._exit(1)
    os._exit(0)  # nothing must be saved, and the teardown of torch would let the engine wait


class _RankProcess:
    """The rank and its channel, with the work of the process's two threads: `answer_messages` and `watch`."""

    def __init__(self, number: int, channel: Channel, store: int) -> None:
        self._number = number
        self._channel = channel
        self._inbox = Inbox(channel, self._note)
        self._groups = ProcessGroups(store)
        self._rank = Rank(self._groups)
        self._credentials = NO_CREDENTIALS
        self._position: tuple[object, ...] = ()
        self._moved = 0.0  # when the position was seen first

    def answer_messages(self) -> None:
        """Answer messages until one says to stop.

        Raises:
            ChannelClosed: the channel has ended.
        """
        while not isinstance(message := self._inbox.get(), Stop):
            if isinstance(message, Credentials):
                continue
            self._groups.credentials = self._credentials
            answer = self._rank.answer(message)
            if answer is not None:
                self._channel.send(encode(answer))

    def _note(self, message: ToRankProcess) -> None:
        """Do at once what a message asks of the process, whatever its main thread does."""
        match message:
            case Credentials():
                self._credentials = message
            case RankSetup():
                self._groups.abort_before(message.incarnation)

    def watch(self) -> None:
        """Send heartbeats, and look after the channel in between."""
        try:
            while True:
                if not self._channel.backlog:  # an idle engine reads nothing: they must not pile up
                    self._channel.send(encode(self._heartbeat()))
                self._inbox.watch(_HEARTBEAT_S)
        except ChannelClosed:
            os._exit(1)

    def _heartbeat(self) -> Heartbeat:
        position, now = self._rank.position, time.monotonic()
        if position != self._position or not position:
            self._position, self._moved = position, now
        return Heartbeat(self._number, self._rank.last_step, self._rank.doing, now - self._moved, self._rank.waits)
