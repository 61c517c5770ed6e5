"""The store and the default process group of a job that torchrun has started."""

import datetime
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed

from shoal.errors import ConfigError

c10d: Any = torch.distributed  # its bindings carry no usable types


class TorchJobStore:
    """Texts that the processes of a job exchange through the store of torchrun."""

    def __init__(self, prefix: str, *, timeout_s: float) -> None:
        """Join the other processes, and initialize `torch.distributed` if the program has not.

        The default group is for the program, which may use it as with vLLM (`torch.distributed.get_rank()`). Shoal's
        ranks do not use it.

        Args:
            prefix: a name that no other store of this job has.
            timeout_s: how long to wait for the others.

        Raises:
            ConfigError: they do not come in time.
        """
        timeout = datetime.timedelta(seconds=timeout_s)
        try:
            store, rank, size = next(iter(c10d.rendezvous("env://", timeout=timeout)))
            if not c10d.is_initialized():
                backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
                default = c10d.PrefixStore("default group", store)
                c10d.init_process_group(backend, store=default, rank=rank, world_size=size, timeout=timeout)
        except (RuntimeError, ValueError) as error:
            why = str(error).splitlines()[0]
            raise ConfigError(f"the processes that torchrun has started do not find each other: {why}") from None
        self._store = c10d.PrefixStore(prefix, store)

    def set(self, values: Mapping[str, str]) -> None:
        for key, value in values.items():
            self._store.set(key, value)

    def get(self, key: str) -> str:
        """Wait for a value, and return it.

        Raises:
            ConfigError: it does not come in time.
        """
        try:
            return bytes(self._store.get(key)).decode()
        except RuntimeError as error:
            why = str(error).splitlines()[0]
            raise ConfigError(f"a process that torchrun has started does not come: no {key} ({why})") from None
