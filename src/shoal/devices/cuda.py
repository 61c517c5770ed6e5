"""What GPUs are here, without loading torch. ROCm's devices look the same to torch and differ only here."""

import importlib.util
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from shoal import env
from shoal.devices import cpu
from shoal.devices.hardware import Hardware
from shoal.errors import ConfigError

_QUERY = ["nvidia-smi", "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits"]


@dataclass(frozen=True, slots=True)
class Gpu:
    """`name` is what CUDA_VISIBLE_DEVICES calls it, else its index; `memory` in bytes, None where it isn't told."""

    name: str
    memory: int | None


def discover(num_devices: int | None = None) -> Hardware | None:
    """None where there is no GPU. CUDA_VISIBLE_DEVICES is honoured: ranks count the visible ones from 0.

    Raises:
        ConfigError: `num_devices` is more than there are; a GPU can't pose as two.
    """
    variable = env.visible_cuda_devices()
    gpus = visible_gpus(_ask(), variable)
    if not gpus:
        return None
    if num_devices is not None and num_devices > len(gpus):
        raise ConfigError(
            f"--num-devices {num_devices}: this host shows {len(gpus)} GPUs{because_of(variable)}; or use --device cpu"
        )
    host = cpu.discover()
    memories = [gpu.memory for gpu in gpus if gpu.memory is not None]
    return Hardware(
        device="cuda",
        num_devices=num_devices or len(gpus),
        cores=host.cores,
        host_memory=host.host_memory,
        host_memory_available=host.host_memory_available,
        device_memory=min(memories) if len(memories) == len(gpus) else None,
        devices_shareable=False,
        limits=host.limits,
        visible_devices=variable,
        visible=() if variable is None else tuple(gpu.name for gpu in gpus),
    )


def because_of(variable: str | None) -> str:
    """How a message about too few GPUs goes on, where CUDA_VISIBLE_DEVICES has this value."""
    return "" if variable is None else f" under CUDA_VISIBLE_DEVICES={variable!r}"


def torch_has_cuda() -> bool:
    """Was the installed PyTorch built for GPUs? Read from its version file: loading it takes seconds."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return False
    text = (Path(found.origin).parent / "version.py").read_text("utf-8")
    return re.search(r"^(?:cuda|hip)\b[^=\n]*= *'", text, re.MULTILINE) is not None


def visible_gpus(listing: str, variable: str | None) -> list[Gpu]:
    """The GPUs in the order in which ranks count them, as CUDA would have it.

    `listing` has lines of index, UUID and MiB; `variable` is CUDA_VISIBLE_DEVICES: indices, beginnings of UUIDs, or
    names of MIG instances, of which a process sees the first alone. What comes after a name that is none is not seen,
    and a GPU named twice hides all.
    (CUDA C++ Programming Guide, on environment variables.)
    """
    rows = [[part.strip() for part in line.split(",")] for line in listing.splitlines()]
    gpus = [(row[0], row[1], int(row[2]) * 2**20) for row in rows if len(row) == 3 and row[2].isdigit()]
    if variable is None:
        return [Gpu(index, memory) for index, _, memory in gpus]
    names = [part.strip() for part in variable.split(",")]
    if gpus and names[0].startswith("MIG-"):
        return [Gpu(names[0], None)]
    found: dict[str, Gpu] = {}
    for name in names:
        match = [gpu for gpu in gpus if name == gpu[0] or (name.startswith("GPU-") and gpu[1].startswith(name))]
        if len(match) != 1:
            break
        ((index, _, memory),) = match
        if index in found:
            return []
        found[index] = Gpu(name, memory)
    return list(found.values())


def _ask() -> str:
    try:
        return subprocess.run(_QUERY, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
