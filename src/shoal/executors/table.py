"""The table of executors, by name. The planner has the rules for choosing one (`planner.planner`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shoal.executors.links import Links
from shoal.executors.node_ranks import NodeListener
from shoal.lazy import load
from shoal.wire.ranks import RankSetup


@dataclass(frozen=True, slots=True)
class ExecutorKind:
    """A way to start ranks."""

    links: str  # module and name of a class of `Links`, with the arguments of `start_ranks` after the name
    in_this_process: bool  # True: ranks load torch into the process of the engine
    replicas_are_threads: bool = False  # True: all replicas are threads of one process, and so on one host


EXECUTORS = {
    "uni": ExecutorKind("shoal.executors.inprocess:InProcessLinks", in_this_process=True),
    "threads": ExecutorKind("shoal.executors.threads:ThreadLinks", in_this_process=True, replicas_are_threads=True),
    "mp": ExecutorKind("shoal.executors.multiprocess:ProcessLinks", in_this_process=False),
    "ray": ExecutorKind("shoal.executors.multiprocess:ProcessLinks", in_this_process=False),
}


def start_ranks(
    name: str, setups: Sequence[RankSetup], groups: Any = None, listener: NodeListener | None = None
) -> Links:
    """Start the ranks of a replica.

    Args:
        name: the name of an executor.
        groups: the groups of threads of several replicas in this process (see `thread_groups`).
        listener: the place where the nodes of a replica over several hosts come.
    """
    kind = load(EXECUTORS[name].links)
    links: Links = kind(setups, groups) if listener is None else kind(setups, groups, listener)
    return links


def thread_groups(comm_timeout_s: float) -> Any:
    """Return the groups through which ranks of several replicas communicate, if all are threads of this process."""
    return load("shoal.executors.threads:ThreadGroups")(comm_timeout_s)
