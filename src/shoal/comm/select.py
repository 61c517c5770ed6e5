"""The choice of the backend by which the ranks of a group exchange tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shoal.errors import CommError

Requested = Literal["auto", "shm", "gloo", "nccl"]
Backend = Literal["shm", "gloo", "nccl", "tree"]  # tree: `HostTreeComm`


@dataclass(frozen=True, slots=True)
class Member:
    """A rank of a group, as it describes itself to the others before they choose a backend."""

    host: str  # equal for processes that can map each other's memory
    process: int
    cores: tuple[int, ...] = ()  # of the rank alone, if there are enough for each to have its own
    unable: str = ""  # why the rank cannot use shared memory; "": it can


def choose_backend(requested: Requested, device: str, members: Sequence[Member]) -> tuple[Backend, str]:
    """Return the backend of a group, and the reason. All ranks get the same answer.

    Raises:
        CommError: the requested backend cannot serve this group.
    """
    obstacle = _obstacle(device, members)
    if requested == "shm":
        if obstacle:
            raise CommError(f"--comm-backend shm: {obstacle}; --comm-backend auto takes what is possible")
        return "shm", "it was asked for"
    if device == "cuda":
        if requested == "gloo":
            raise CommError("--comm-backend gloo: tensors on GPUs need nccl; --comm-backend auto takes it")
        return "nccl", "the tensors are on GPUs"
    if requested == "gloo":
        return "gloo", "it was asked for"
    hosts = len({member.host for member in members})
    if 1 < hosts < len(members):
        return "tree", f"{len(members)} ranks on {hosts} hosts: sums are formed on each host first"
    if obstacle:
        return "gloo", obstacle
    return "shm", f"{len(members)} ranks on one host"


def _obstacle(device: str, members: Sequence[Member]) -> str:
    """Return why the ranks cannot use shared memory; "": they can."""
    if device == "cuda":
        return "the tensors are on GPUs"
    if len({member.host for member in members}) > 1:
        return f"the {len(members)} ranks are on {len({member.host for member in members})} hosts"
    return next((f"rank {rank}: {member.unable}" for rank, member in enumerate(members) if member.unable), "")
