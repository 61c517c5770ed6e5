"""What GPUs are here, without loading torch. ROCm's devices look the same to torch and differ only here."""

import importlib.util
import re
import subprocess
from pathlib import Path

from shoal import env
from shoal.devices import cpu
from shoal.errors import ConfigError
from shoal.types import Hardware

_QUERY = ["nvidia-smi", "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits"]


def discover(num_devices: int | None = None) -> Hardware | None:
    """None where there is no GPU. CUDA_VISIBLE_DEVICES is honoured: ranks count the visible ones from 0.

    Raises:
        ConfigError: `num_devices` is more than there are; a GPU can't pose as two.
    """
    memories = visible_memories(_ask(), env.visible_cuda_devices())
    if not memories:
        return None
    if num_devices is not None and num_devices > len(memories):
        raise ConfigError(f"--num-devices {num_devices}: this host shows {len(memories)} GPUs; or use --device cpu")
    host = cpu.discover()
    return Hardware(
        device="cuda",
        num_devices=num_devices or len(memories),
        cores=host.cores,
        host_memory=host.host_memory,
        host_memory_available=host.host_memory_available,
        device_memory=min(memories),
        devices_shareable=False,
    )


def torch_has_cuda() -> bool:
    """Was the installed PyTorch built for GPUs? Read from its version file: loading it takes seconds."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return False
    text = (Path(found.origin).parent / "version.py").read_text("utf-8")
    return re.search(r"^(?:cuda|hip)\b[^=\n]*= *'", text, re.MULTILINE) is not None


def visible_memories(listing: str, visible: str | None) -> list[int]:
    """Bytes of each GPU's memory, in the order in which ranks count them.

    `listing` has lines of index, UUID and MiB; `visible` is CUDA_VISIBLE_DEVICES, by index or by UUID's beginning.
    """
    rows = [[part.strip() for part in line.split(",")] for line in listing.splitlines()]
    gpus = [(row[0], row[1], int(row[2]) * 2**20) for row in rows if len(row) == 3 and row[2].isdigit()]
    if visible is None:
        return [memory for _, _, memory in gpus]
    found: list[int] = []
    for name in (part.strip() for part in visible.split(",")):
        match = [memory for index, uuid, memory in gpus if name and (name == index or uuid.startswith(name))]
        if not match:  # as CUDA does: what comes after a name that is none, is not seen
            break
        found.append(match[0])
    return found


def _ask() -> str:
    try:
        return subprocess.run(_QUERY, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
