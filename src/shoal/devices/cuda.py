"""What GPUs are here, without loading torch. ROCm's devices look the same to torch and differ only here."""

import subprocess

from shoal import env
from shoal.devices import cpu
from shoal.types import Hardware

_QUERY = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]


def discover(num_devices: int | None = None) -> Hardware | None:
    """None where there is no GPU. CUDA_VISIBLE_DEVICES is honoured: ranks count the visible ones from 0."""
    memories = _device_memories()
    visible = env.visible_cuda_devices()
    if visible is not None:
        names = [name for name in visible.split(",") if name.strip() not in {"", "-1"}]
        memories = memories[: len(names)]
    if not memories:
        return None
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


def _device_memories() -> list[int]:
    """Bytes of each GPU's memory."""
    try:
        answer = subprocess.run(_QUERY, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [int(line) * 2**20 for line in answer.split() if line.isdigit()]
