"""Ranks as child processes of this process."""

import contextlib
from collections.abc import Container, Iterable, Sequence

from shoal.addresses import is_local
from shoal.executors.fork_server import ForkedRank
from shoal.executors.rank_processes import NO_STORE, RankProcesses
from shoal.transport.channel import Channel, ChannelClosed
from shoal.transport.process import end_all
from shoal.wire.base import Ids
from shoal.wire.credentials import NO_CREDENTIALS
from shoal.wire.nodes import RankEnvironment, StartRank
from shoal.wire.ranks import FromRank, Preparation, RankSetup, from_rank

_END_S = 1.0


def start_order(setup: RankSetup, variables: dict[str, str] | None = None, receiver: str = "") -> StartRank:
    """Return the order to start the process of a rank. See `RankEnvironment` and `StartRank` for the arguments."""
    plan = setup.plan
    cores: Ids = setup.rank_plan.cores if plan.bind_cores else ()
    address = "" if is_local(setup.address) else setup.address
    models = (plan.model,) if plan.draft is None else (plan.model, plan.draft)
    preparation = Preparation(setup.rank_plan.device, plan.dtype, models)
    return StartRank(setup.rank, cores, preparation, RankEnvironment(address, variables or {}), receiver)


class LocalRanks:
    """A `RankPart` of child processes."""

    def __init__(self, setups: Sequence[RankSetup], store: int = NO_STORE) -> None:
        """Start nothing yet. `store` is that of `RankProcesses`."""
        self.ranks: Sequence[int] = [setup.rank for setup in setups]
        self.ended: dict[int, str] = {}
        self.can_replace = True
        self._orders = {setup.rank: start_order(setup) for setup in setups}
        self._spares = sum(setup.plan.warm_spares_on(setup.rank_plan.node) for setup in setups[:1])
        self._processes = RankProcesses(setups[0].plan.place.credentials if setups else NO_CREDENTIALS, store)
        self._children: dict[int, ForkedRank] = {}

    def start(self) -> None:
        for rank in self._orders:
            self._start(rank)

    def replace(self, rank: int) -> None:
        self._children[rank].kill()
        self.ended.pop(rank, None)
        self._start(rank)

    def _start(self, rank: int) -> None:
        self._children[rank] = self._processes.start(self._orders[rank])

    def keep_spares(self) -> None:
        self._processes.keep_spares(self._spares)

    @property
    def channels(self) -> list[Channel]:
        return [*(child.channel for child in self._children.values()), *self._processes.channels]

    def send(self, frame: bytes, rank: int | None = None) -> None:
        for child in self._children.values() if rank is None else [self._children[rank]]:
            with contextlib.suppress(ChannelClosed):  # `receive` will notice it
                child.channel.send(frame)

    def receive(self, readable: Container[Channel]) -> Iterable[FromRank]:
        messages: list[FromRank] = [*self._processes.tick(readable)]
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
        return self._children[rank].describe()

    def close(self, goodbye: bytes | None) -> None:
        self._processes.close()
        end_all(list(self._children.values()), goodbye, _END_S)
