"""The hardware of a host: devices, cores and memory. This module is free of torch."""

from dataclasses import dataclass
from typing import Literal

from shoal.devices.numa import MemoryNode


@dataclass(frozen=True, slots=True)
class Hardware:
    """The devices, cores and memory that this process may use. Memory is in bytes."""

    device: Literal["cpu", "cuda"]
    num_devices: int
    cores: tuple[int, ...]
    host_memory: int
    host_memory_available: int
    device_memory: int | None  # of the smallest device; None if it is not known yet
    devices_shareable: bool  # True if several ranks may use one device
    visible_devices: str | None = None  # the value of CUDA_VISIBLE_DEVICES; None: it is not set
    visible: tuple[str, ...] = ()  # the names of the devices in CUDA_VISIBLE_DEVICES, if that is set
    limits: tuple[str, ...] = ()  # for the user: why there is less than the machine has
    nodes: tuple[MemoryNode, ...] = ()  # the NUMA nodes with these cores; () on a host that has only one node
