"""A replica as a replica set sees it, and the start of several replicas."""

import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from shoal.cluster.replicas.replica import close_all
from shoal.errors import EngineError
from shoal.log import get_logger
from shoal.protocols import EngineClient, TracedClient
from shoal.transport.channel import Channel, wait
from shoal.wire.engine import ControlReply, EngineOrder, EngineStats

log = get_logger("replicas")

_SLICE_S = 0.5  # how often the deadline is checked


class ReplicaClient(EngineClient, TracedClient, Protocol):
    """One of several replicas. `Replica` is the implementation."""

    name: str
    died: bool  # True: it has failed, and the engine itself has not reported the failure
    snapshot: EngineStats | None  # the latest stats that the engine sent without being asked
    num_messages: int  # how many times the engine has sent something

    @property
    def channel(self) -> Channel: ...

    def ready(self, timeout: float) -> EngineStats | None: ...

    def stats(self, timeout: float | None = None) -> EngineStats: ...

    def send_order(self, order: EngineOrder) -> None: ...

    def answers(self) -> list[ControlReply]:
        """Return the answers to orders that came with the last `updates`."""

    def tell_trace_end(self) -> bool:
        """Tell the engine to end its trace. Return whether `take_trace` will return a message that it has ended."""

    @property
    def has_ended(self) -> bool: ...

    def say_goodbye(self) -> None: ...

    def dismiss(self) -> None: ...

    def end(self, deadline: float) -> None: ...

    def abandon(self) -> None: ...


def wait_for_any(replicas: Sequence[ReplicaClient], timeout: float) -> None:
    """Wait until a replica has sent something, for at most `timeout` seconds."""
    wait([replica.channel for replica in replicas], timeout)


def await_ready(replicas: Mapping[int, ReplicaClient], timeout: float) -> dict[int, EngineStats]:
    """Wait until all replicas can take requests, and return their first stats. If one fails, all are closed.

    Raises:
        UserError: a replica was asked for something that cannot work; the message names it.
        EngineError: a replica failed, or was not ready within `timeout` seconds.
    """
    begun = time.monotonic()
    found: dict[int, EngineStats] = {}
    try:
        while missing := {number: replica for number, replica in replicas.items() if number not in found}:
            if time.monotonic() - begun > timeout:
                names = ", ".join(replica.name for replica in missing.values())
                raise EngineError(f"{names}: not ready within {timeout:g} s")
            wait_for_any(list(missing.values()), _SLICE_S)
            for number, replica in missing.items():
                stats = replica.ready(0)
                if stats is not None:
                    found[number] = stats
                    log.info(
                        "%s is ready after %.2f s: %d KV blocks, %d of %d",
                        *(replica.name, time.monotonic() - begun, stats.num_blocks, len(found), len(replicas)),
                    )
    except BaseException:
        close_all(list(replicas.values()))
        raise
    return found
