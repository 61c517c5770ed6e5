"""Communicators of ranks that are processes: torch.distributed over a store that all of them reach."""

from collections.abc import Sequence
from typing import Any

import torch

from shoal import wire
from shoal.comm.base import Communicator
from shoal.comm.torch_dist import TorchComm, c10d


class ProcessGroups:
    """`store_path` names a file of the engine's that has no name of its own: nothing to clean up, nothing to clash."""

    def __init__(self, store_path: str, world_size: int) -> None:
        self._store_path = store_path
        self._world_size = world_size
        self._store: Any = None

    def __call__(self, setup: wire.RankSetup, axis: str, ranks: Sequence[int]) -> Communicator:
        if self._store is None:
            self._store = c10d.FileStore(self._store_path, self._world_size)
        cuda = setup.device == "cuda"
        return TorchComm(
            self._store,
            f"{axis}:{ranks[0]}",
            ranks.index(setup.global_rank),
            len(ranks),
            backend="nccl" if cuda else "gloo",
            timeout_s=setup.comm_timeout_s,
            device=torch.device("cuda", setup.device_index) if cuda else torch.device("cpu"),
        )
