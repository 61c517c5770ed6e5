"""Ranks as child processes of this process (`python -m shoal.worker`)."""

import contextlib
from collections.abc import Container, Iterable, Sequence

from shoal import env
from shoal.addresses import is_local
from shoal.devices import cpu, network
from shoal.transport.channel import Channel, ChannelClosed
from shoal.transport.process import ChildProcess, end_all
from shoal.wire.base import Ids, encode
from shoal.wire.credentials import NO_CREDENTIALS, Credentials
from shoal.wire.nodes import StartRank
from shoal.wire.ranks import FromRank, RankSetup, from_rank

_END_S = 1.0
NO_STORE = -1  # instead of a file descriptor: the ranks find each other elsewhere


def start_order(setup: RankSetup) -> StartRank:
    """Return what must be known to start the process of a rank."""
    cores: Ids = setup.rank_plan.cores if setup.plan.bind_cores else ()
    return StartRank(setup.rank, cores, "" if is_local(setup.address) else setup.address)


def start_rank(order: StartRank, credentials: Credentials, store: int = NO_STORE) -> ChildProcess:
    """Start the process of a rank.

    Args:
        credentials: of this host, for the places where ranks of several hosts find each other.
        store: the descriptor of the file through which ranks of one host find each other.

    Raises:
        OSError: there is no memory for a process, or no file descriptor left.
    """
    arguments = ["--rank", str(order.rank), "--store", str(store)]
    environment = env.not_set_here(order.variables)
    if order.address:
        environment |= network.socket_environment(order.address)
    if order.cores:
        environment |= cpu.pinning_environment(order.cores)
    child = ChildProcess("shoal.worker", arguments, environment, [] if store == NO_STORE else [store])
    child.say(encode(credentials))
    return child


class LocalRanks:
    """A `RankPart` of child processes."""

    def __init__(self, setups: Sequence[RankSetup], store: int = NO_STORE) -> None:
        """Start nothing yet. `store` is that of `start_rank`."""
        self.ranks: Sequence[int] = [setup.rank for setup in setups]
        self.ended: dict[int, str] = {}
        self.can_replace = True
        self._orders = {setup.rank: start_order(setup) for setup in setups}
        self._credentials = setups[0].plan.place.credentials if setups else NO_CREDENTIALS
        self._store = store
        self._children: dict[int, ChildProcess] = {}

    def start(self) -> None:
        for rank in self._orders:
            self._start(rank)

    def replace(self, rank: int) -> None:
        self._children[rank].kill()
        self.ended.pop(rank, None)
        self._start(rank)

    def _start(self, rank: int) -> None:
        self._children[rank] = start_rank(self._orders[rank], self._credentials, self._store)

    @property
    def channels(self) -> list[Channel]:
        return [child.channel for child in self._children.values()]

    def send(self, frame: bytes, rank: int | None = None) -> None:
        for child in self._children.values() if rank is None else [self._children[rank]]:
            with contextlib.suppress(ChannelClosed):  # `receive` will notice it
                child.channel.send(frame)

    def receive(self, readable: Container[Channel]) -> Iterable[FromRank]:
        messages: list[FromRank] = []
        for rank, child in self._children.items():
            if child.channel in readable:
                try:
                    messages += [from_rank.decode(frame) for frame in child.channel.receive()]
                except ChannelClosed:
                    self.ended[rank] = child.describe_exit()
        return messages

    def suspended(self, rank: int) -> bool:
        return self._children[rank].stopped()

    def describe(self, rank: int) -> str:
        return f"process {self._children[rank].pid}"

    def close(self, goodbye: bytes | None) -> None:
        end_all(list(self._children.values()), goodbye, _END_S)
