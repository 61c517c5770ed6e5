"""What a host has: devices, cores and memory. Free of torch."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Hardware:
    """What a host offers. Memory in bytes; `device_memory` is one device's, None where it can't be known yet."""

    device: Literal["cpu", "cuda"]
    num_devices: int
    cores: tuple[int, ...]
    host_memory: int
    host_memory_available: int
    device_memory: int | None
    devices_shareable: bool  # may several ranks use one device?
    visible_devices: str | None = None  # the value of CUDA_VISIBLE_DEVICES; None: it is not set
    visible: tuple[str, ...] = ()  # how CUDA_VISIBLE_DEVICES names the devices, where it is set
    limits: tuple[str, ...] = ()  # why it is less than the machine has, in words
