"""Forming the group of a `ProcessComm`: the ranks tell each other where they run, choose a backend, and connect."""

import json
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from shoal.comm.base import Communicator, Progress
from shoal.comm.host_tree import HostTreeComm
from shoal.comm.local import LocalComm
from shoal.comm.select import Member, Requested, choose_backend
from shoal.comm.shared_memory import SharedMemory, SharedMemoryComm, host_identity
from shoal.comm.shared_memory_library import load_library
from shoal.comm.torch_distributed import TorchComm
from shoal.errors import CommAborted, CommError, CommTimeout

_FIRST_PAUSE_S, _PAUSE_S = 0.0005, 0.02  # between two looks at the store, shorter at first


@dataclass(frozen=True, slots=True)
class Formation:
    """One rank's part in the forming of a group, whose ranks share a store."""

    store: Any
    prefix: str  # of the keys; new in the store each time
    rank: int
    size: int
    requested: Requested
    timeout_s: float
    device: torch.device
    interface_address: str
    cores: tuple[int, ...]  # that are bound to this rank, if any are
    aborted: threading.Event  # ends the waits for the others
    progress: Progress

    def form(self) -> tuple[Communicator, str]:
        """Return the communicator, and the reason for the choice of its backend.

        Raises:
            CommAborted: `aborted` was set.
            CommTimeout: a rank did not come in time.
            CommError: the requested backend cannot be used.
        """
        with self.progress.connecting():
            members = self._introduce()
            backend, reason = choose_backend(self.requested, self.device.type, members)
            if backend == "tree":
                return self._tree(members), reason
            if backend == "shm":
                comm, problem = self._share_memory(range(self.size), members, self.progress)
                if comm is not None:
                    return comm, reason
                if self.requested == "shm":
                    raise CommError(f"--comm-backend shm: {problem}; --comm-backend auto takes what is possible")
                backend, reason = "gloo", problem
        return self._connect(backend, range(self.size), "", self.progress), reason

    def _introduce(self) -> list[Member]:
        """Tell the others about this rank, and return what all of them tell."""
        if self.device.type == "cuda" or self.requested == "gloo":
            return []  # the choice does not depend on it
        library, reason = load_library()
        unable = reason if library is None else ""
        if library is not None and self.size > library.max_ranks():
            unable = f"shared memory serves at most {library.max_ranks()} ranks, and there are {self.size}"
        own = Member(host_identity(), os.getpid(), self.cores, unable)
        self._set(f"member/{self.rank}", json.dumps(asdict(own)))
        told = [json.loads(self._get(f"member/{rank}", rank)) for rank in range(self.size)]
        return [Member(**{**fields, "cores": tuple(fields["cores"])}) for fields in told]

    def _tree(self, members: Sequence[Member]) -> Communicator:
        """Return a communicator that sums on each host first."""
        names = list(dict.fromkeys(member.host for member in members))
        hosts = [[rank for rank, member in enumerate(members) if member.host == name] for name in names]
        number = next(number for number, ranks in enumerate(hosts) if self.rank in ranks)
        local: Communicator = LocalComm()
        if len(hosts[number]) > 1:
            shared, _ = self._share_memory(hosts[number], members, Progress(), f"host {number}/")
            local = shared or self._connect("gloo", hosts[number], f"host {number}/", Progress())
        leaders = [ranks[0] for ranks in hosts]
        between = self._connect("gloo", leaders, "leaders/", Progress()) if self.rank in leaders else None
        flat = self._connect("gloo", range(self.size), "", self.progress)
        return HostTreeComm(flat, local, between)

    def _connect(self, backend: str, ranks: Sequence[int], group: str, progress: Progress) -> Communicator:
        """Return a communicator of some ranks on a backend of torch.distributed. `group`: the beginning of its keys."""
        return TorchComm(
            self.store,
            f"{self.prefix}/{group}",
            ranks.index(self.rank),
            len(ranks),
            backend=backend,
            timeout_s=self.timeout_s,
            device=self.device,
            interface_address=self.interface_address,
            aborted=self.aborted,
            progress=progress,
        )

    def _share_memory(
        self, ranks: Sequence[int], members: Sequence[Member], progress: Progress, group: str = ""
    ) -> tuple[Communicator | None, str]:
        """Return a communicator of some ranks of one host on shared memory.

        If one of them cannot map the memory, all get None, and the reason.
        """
        memory, problem, first = None, "", ranks[0]
        try:
            if self.rank == first:
                memory = SharedMemory.make(len(ranks))
                self._set(f"{group}memory", memory.name)
            else:
                memory = SharedMemory.open(self._get(f"{group}memory", first).decode())
        except (OSError, ValueError) as error:
            problem = f"rank {self.rank} cannot map shared memory: {error}"
            if self.rank == first:
                self._set(f"{group}memory", "none")
        self._set(f"{group}mapped/{self.rank}", problem)
        problems = [self._get(f"{group}mapped/{rank}", rank).decode() for rank in ranks]
        if memory is None or any(problems):
            return None, next(each for each in problems if each)
        memory.close_file()
        here = [members[rank] for rank in ranks]
        used = [core for member in here for core in member.cores]
        comm = SharedMemoryComm(
            memory,
            ranks.index(self.rank),
            [member.process for member in here],
            numbers=ranks,
            timeout_s=self.timeout_s,
            spin=all(member.cores for member in here) and len(set(used)) == len(used),
            progress=progress,
        )
        return comm, ""

    def _set(self, key: str, value: str) -> None:
        self.store.set(f"{self.prefix}/{key}", value)

    def _get(self, key: str, rank: int) -> bytes:
        """Wait until another rank has set a key, and return the value."""
        deadline, pause = time.monotonic() + self.timeout_s, _FIRST_PAUSE_S
        where = f"rank {self.rank} of {self.size}: {self.progress}"
        while True:
            if self.aborted.is_set():
                raise CommAborted(f"{where} was aborted")
            if self.store.check([f"{self.prefix}/{key}"]):
                return bytes(self.store.get(f"{self.prefix}/{key}"))
            if time.monotonic() > deadline:
                raise CommTimeout(f"{where} waited {self.timeout_s:g} s for rank {rank}")
            self.aborted.wait(pause)
            pause = min(2 * pause, _PAUSE_S)
