"""The executors by name: how the ranks of a replica are started."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shoal.executors.base import Links
from shoal.lazy import load
from shoal.wire.ranks import RankSetup


@dataclass(frozen=True, slots=True)
class ExecutorKind:
    """One way to start ranks. `links` names a class that is made of the ranks' setups and the groups of threads."""

    links: str
    in_this_process: bool  # ranks load torch into the process of the engine


EXECUTORS = {
    "uni": ExecutorKind("shoal.executors.inprocess:InProcessLinks", in_this_process=True),
    "threads": ExecutorKind("shoal.executors.threads:ThreadLinks", in_this_process=True),
    "mp": ExecutorKind("shoal.executors.multiprocess:ProcessLinks", in_this_process=False),
}


def start_ranks(name: str, setups: Sequence[RankSetup], groups: Any = None) -> Links:
    """Start the ranks of a replica. `groups`: where ranks that are threads meet those of other replicas."""
    links: Links = load(EXECUTORS[name].links)(setups, groups)
    return links


def thread_groups(comm_timeout_s: float) -> Any:
    """Return a place where ranks of several replicas meet that are threads of this process."""
    return load("shoal.executors.threads:ThreadGroups")(comm_timeout_s)
