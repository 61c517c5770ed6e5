"""A fork server: `python -m shoal.worker --fd N --parent PID --orders N [--store N]` (see `executors.fork_server`).

It loads everything that a rank needs, and then forks a process for each rank that it is ordered to. While it forks it
has one thread, since no other one would outlive the fork.
"""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import click

from shoal.log import configure_logging
from shoal.process import garbage_collector
from shoal.transport.channel import Channel, ChannelClosed
from shoal.transport.process import await_adoption, die_with_parent
from shoal.wire.base import encode
from shoal.wire.ranks import Forked, ForkServerReady, Loading, Preparation, TakeRank, to_fork_server

_SIGN_OF_LIFE_S = 0.5
_NICE = 5  # of the thread that loads while ranks compute: it gets a third of what a rank gets on the same core
_MAX_ORDER_BYTES = 1 << 20
_PID_BYTES = 8


@click.command()
@click.option("--fd", type=int, required=True)
@click.option("--parent", type=int, required=True)
@click.option("--orders", type=int, required=True)
@click.option("--store", type=int, default=-1)
def main(fd: int, parent: int, orders: int, store: int) -> None:
    die_with_parent(parent)
    garbage_collector.collect_rarely()
    for each in (signal.SIGINT, signal.SIGTERM):  # they may reach the whole process group; the engine ends its ranks
        signal.signal(each, signal.SIG_IGN)
    configure_logging("(fork server) ")
    channel = Channel.from_fd(fd)
    with socket.socket(fileno=orders) as taken, suppress(ChannelClosed):
        if rank := _serve(channel, taken, parent):
            _be_rank(*rank, store)
    os._exit(0)  # nothing must be saved, and the teardown of torch would take long


def _serve(channel: Channel, orders: socket.socket, parent: int) -> tuple[TakeRank, int] | None:
    """Load everything, and fork what is ordered.

    Returns:
        In the process of a rank: the order, and the descriptor of the rank's channel. In the fork server: None, once
        its owner has closed the socket.

    Raises:
        ChannelClosed: the owner has ended.
    """
    preparation = to_fork_server.decode(orders.recv(_MAX_ORDER_BYTES))
    assert isinstance(preparation, Preparation)
    _load(channel, preparation)
    while True:
        frame, fds, _, _ = socket.recv_fds(orders, _MAX_ORDER_BYTES, 1)
        if not frame:
            return None
        order = to_fork_server.decode(frame)
        assert isinstance(order, TakeRank)
        try:
            if not fds:
                raise OSError("no file descriptor is left for its channel")
            pid = _fork(parent)
            if not pid:
                orders.close()
                return order, fds[0]
            answer = Forked(pid)
        except OSError as error:
            answer = Forked(error=str(error))
        for each in fds:
            os.close(each)
        channel.send(encode(answer))


def _load(channel: Channel, preparation: Preparation) -> None:
    with _signs_of_life(channel):
        if preparation.low_priority:
            # A thread of a low priority does it: this thread could not raise its priority again.
            thread = threading.Thread(target=_prepare, args=(preparation, _NICE), name="prepare")
            thread.start()
            thread.join()
        else:
            _prepare(preparation)
    garbage_collector.freeze_imports()

    from shoal.devices import cpu

    channel.send(encode(ForkServerReady(cpu.anonymous_memory())))


def _prepare(preparation: Preparation, nice: int = 0) -> None:
    if nice:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
    from shoal.worker.preparation import prepare  # loads torch

    prepare(preparation)


@contextmanager
def _signs_of_life(channel: Channel) -> Iterator[None]:
    """Tell the owner again and again that this process still loads."""
    done = threading.Event()

    def tell() -> None:
        try:
            while not done.wait(_SIGN_OF_LIFE_S):
                channel.send(encode(Loading()))
        except ChannelClosed:
            os._exit(1)

    thread = threading.Thread(target=tell, name="signs-of-life")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _fork(parent: int) -> int:
    """Fork a process whose parent becomes the process `parent`.

    Returns:
        The number of the process; 0 in that process.

    Raises:
        OSError: no process can be forked now.
    """
    read, write = os.pipe()
    between = os.fork()
    if not between:
        try:
            pid = os.fork()
            if pid:
                os.write(write, pid.to_bytes(_PID_BYTES, "little"))
        except OSError:
            os._exit(1)
        if pid:
            os._exit(0)
        os.close(read)
        os.close(write)
        await_adoption(parent)
        return 0
    os.close(write)
    with open(read, "rb") as pipe:
        answer = pipe.read(_PID_BYTES)
    os.waitpid(between, 0)
    if not answer:
        raise OSError("the system has no room for another process")
    return int.from_bytes(answer, "little")


def _be_rank(order: TakeRank, fd: int, store: int) -> None:
    from shoal.worker.rank_process import run

    run(order, Channel.from_fd(fd), store)


if __name__ == "__main__":
    main()
