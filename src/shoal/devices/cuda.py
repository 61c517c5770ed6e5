"""The GPUs of this host, found without torch. ROCm would differ only here: to torch its devices look the same."""

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
    """A visible GPU."""

    name: str  # its name in CUDA_VISIBLE_DEVICES, or its index if that is not set
    memory: int | None  # in bytes; None if it is not known


def discover(num_devices: int | None = None) -> Hardware | None:
    """Return the hardware of a host with GPUs, or None if there is no GPU.

    Only GPUs in CUDA_VISIBLE_DEVICES count, if that is set; ranks number them from 0.

    Raises:
        ConfigError: `num_devices` is more than the number of GPUs.
    """
    variable = env.visible_cuda_devices()
    gpus = visible_gpus(_query_gpus(), variable)
    if not gpus:
        return None
    if num_devices is not None and num_devices > len(gpus):
        found = f"this host shows {len(gpus)} GPUs{describe_visibility(variable)}"
        raise ConfigError(f"--num-devices {num_devices}: {found}; or use --device cpu")
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
        nodes=host.nodes,
        visible_devices=variable,
        visible=() if variable is None else tuple(gpu.name for gpu in gpus),
    )


def describe_visibility(variable: str | None) -> str:
    """Return a part of a message about too few GPUs that shows the value of CUDA_VISIBLE_DEVICES, if it is set."""
    return "" if variable is None else f" under CUDA_VISIBLE_DEVICES={variable!r}"


def torch_has_cuda() -> bool:
    """Tell whether the installed PyTorch was built for GPUs. Reads its version file, since loading it takes seconds."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return False
    text = (Path(found.origin).parent / "version.py").read_text("utf-8")
    return re.search(r"^(?:cuda|hip)\b[^=\n]*= *'", text, re.MULTILINE) is not None


def visible_gpus(listing: str, variable: str | None) -> list[Gpu]:
    """Return the visible GPUs by the rules of CUDA, in the order in which ranks number them.

    `listing` has lines of index, UUID and MiB; `variable` is the value of CUDA_VISIBLE_DEVICES: indices, prefixes of
    UUIDs, or names of MIG instances, of which a process sees only the first. Names after an invalid one are ignored,
    and a GPU that is named twice hides all GPUs. (CUDA C++ Programming Guide, on environment variables.)
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


def _query_gpus() -> str:
    """Return the output of nvidia-smi, or "" if it cannot be run."""
    try:
        return subprocess.run(_QUERY, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
