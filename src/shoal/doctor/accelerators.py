"""The GPUs of this host, as nvidia-smi or rocm-smi lists them, and which of them CUDA_VISIBLE_DEVICES hides."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal import env
from shoal.devices import cpu, cuda
from shoal.doctor.kinds import failure, ok, warning
from shoal.doctor.tools import RunTool, run_tool
from shoal.values import format_bytes
from shoal.wire.doctor import Finding
from shoal.wire.topology import Device, with_fields

_FIELDS = "index,uuid,name,pci.bus_id,memory.total,memory.used,driver_version"
QUERY = ("nvidia-smi", f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits")
ROCM_QUERY = ("rocm-smi", "--showproductname", "--showuniqueid", "--showbus", "--showmeminfo", "vram", "--json")
NVIDIA_DRIVER, AMD_DRIVER = Path("proc/driver/nvidia/version"), Path("sys/module/amdgpu")
_MIB = 1 << 20
_BUSY = 0.1  # the share of a GPU's memory that others may hold without a warning


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """The GPUs of this host. `error`: the vendor's tool fails, or is not there although GPUs of the vendor are."""

    devices: tuple[Device, ...] = ()
    used: tuple[int, ...] = ()  # bytes of each that are in use
    driver: str = ""
    error: str = ""
    on_bus: int = 0  # GPUs of NVIDIA on the PCIe bus, with or without a driver
    variable: str | None = None  # the value of CUDA_VISIBLE_DEVICES
    variable_name: str = "CUDA_VISIBLE_DEVICES"  # ROCm has other variables too
    order: str = ""  # the value of CUDA_DEVICE_ORDER

    @property
    def visible(self) -> tuple[Device, ...]:
        return tuple(device for device in self.devices if device.visible)


def gather(run: RunTool = run_tool, root: Path = cpu.ROOT) -> GpuFacts:
    """List the GPUs of this host. `root` has the folders proc and sys."""
    variable, variables = env.visible_cuda_devices(), env.communication_variables()
    if (output := run(QUERY)).missing:
        if (root / NVIDIA_DRIVER).exists():
            return GpuFacts(error="the driver of NVIDIA is loaded, but nvidia-smi is not installed", on_bus=1)
        return _gather_amd(run, root, variable, variables)
    devices, used, driver = read_nvidia("" if output.error else output.text)
    return GpuFacts(
        devices=_completed(devices, variable, root),
        used=used,
        driver=driver,
        error=output.error,
        on_bus=count_on_bus(root),
        variable=variable,
        order=variables.get("CUDA_DEVICE_ORDER", ""),
    )


def _gather_amd(run: RunTool, root: Path, cuda_variable: str | None, variables: Mapping[str, str]) -> GpuFacts:
    """List the GPUs of AMD, from rocm-smi or, without it, from /sys. ROCm reads CUDA's variable too."""
    output = run(ROCM_QUERY)
    devices, used = read_rocm(output.text)
    if not devices:
        devices, used = read_amdgpu(root)
    names = ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
    name = next((each for each in names if each in variables), "CUDA_VISIBLE_DEVICES")
    variable = variables.get(name, cuda_variable)
    loaded = (root / AMD_DRIVER).exists()
    return GpuFacts(
        devices=_completed(devices, variable, root),
        used=used,
        error=output.error if loaded and not output.missing else "",
        on_bus=int(loaded),
        variable=variable,
        variable_name=name,
    )


def _completed(devices: Sequence[Device], variable: str | None, root: Path) -> tuple[Device, ...]:
    """Return the GPUs with their NUMA nodes, and whether the variable hides them."""
    return tuple(replace_numa(device, root) for device in mark_visible(devices, variable))


def read_nvidia(listing: str) -> tuple[tuple[Device, ...], tuple[int, ...], str]:
    """Read the output of `QUERY`. Return the GPUs, the used bytes of each, and the version of the driver."""
    devices, used, driver = [], [], ""
    for line in listing.splitlines():
        row = [part.strip() for part in line.split(",")]
        if len(row) != len(_FIELDS.split(",")) or not row[0].isdigit():
            continue
        index, uuid, name, bus, total, in_use, driver = row
        devices.append(
            Device(
                index=int(index),
                name=name,
                uuid=uuid,
                bus=short_bus(bus),
                memory=int(total) * _MIB if total.isdigit() else None,
            )
        )
        used.append(int(in_use) * _MIB if in_use.isdigit() else 0)
    return tuple(devices), tuple(used), driver


def short_bus(bus: str) -> str:
    """Return an address of the PCIe bus as /sys has it: 00000000:1B:00.0 -> 0000:1b:00.0."""
    domain, colon, rest = bus.lower().partition(":")
    return f"{domain[-4:]}:{rest}" if colon and len(domain) >= 4 else bus.lower()


def read_rocm(text: str) -> tuple[tuple[Device, ...], tuple[int, ...]]:
    """Read the output of `ROCM_QUERY`. Return the GPUs and the used bytes of each."""
    try:
        cards: Mapping[str, Mapping[str, Any]] = json.loads(text)
    except ValueError:
        return (), ()
    devices, used = [], []
    for key in sorted((key for key in cards if key.startswith("card")), key=lambda key: int(key[4:] or 0)):
        card = {name.lower(): str(value) for name, value in cards[key].items()}
        total = card.get("vram total memory (b)", "")
        in_use = card.get("vram total used memory (b)", "")
        devices.append(
            Device(
                index=int(key[4:]),
                kind="rocm",
                name=card.get("card series", card.get("card model", "")),
                uuid=card.get("unique id", ""),
                bus=card.get("pci bus", "").lower(),
                memory=int(total) if total.isdigit() else None,
            )
        )
        used.append(int(in_use) if in_use.isdigit() else 0)
    return tuple(devices), tuple(used)


def count_on_bus(root: Path) -> int:
    """Return how many GPUs of NVIDIA are on the PCIe bus: a container may hide their driver, but not these files."""
    folders = (root / "sys/bus/pci/devices").glob("*")
    return sum(_text(each / "vendor") == "0x10de" and _text(each / "class").startswith("0x03") for each in folders)


def read_amdgpu(root: Path) -> tuple[tuple[Device, ...], tuple[int, ...]]:
    """Return the GPUs of AMD that the kernel's driver shows in /sys, in the order of the bus, and their used bytes."""
    folders = sorted((root / "sys/bus/pci/drivers/amdgpu").glob("*:*:*.*"))
    devices = [
        Device(
            index=index,
            kind="rocm",
            name=_text(folder / "product_name") or "AMD GPU",
            uuid=_text(folder / "unique_id"),
            bus=folder.name,
            memory=_number(folder / "mem_info_vram_total"),
        )
        for index, folder in enumerate(folders)
    ]
    return tuple(devices), tuple(_number(folder / "mem_info_vram_used") or 0 for folder in folders)


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except (OSError, ValueError):
        return ""


def _number(file: Path) -> int | None:
    text = _text(file)
    return int(text) if text.isdigit() else None


def mark_visible(devices: Sequence[Device], variable: str | None) -> tuple[Device, ...]:
    """Return the GPUs, with `visible` set by the rules of CUDA."""
    if variable is not None and variable.strip().startswith("MIG-"):
        return tuple(devices)  # the tool does not say which GPU has that instance
    listing = "\n".join(f"{each.index}, {each.uuid}, {(each.memory or 0) // _MIB}" for each in devices)
    named = [gpu.name for gpu in cuda.visible_gpus(listing, variable)]
    return tuple(with_fields(each, visible=any(_means(name, each) for name in named)) for each in devices)


def _means(name: str, device: Device) -> bool:
    return name == str(device.index) or (name.startswith("GPU-") and device.uuid.startswith(name))


def replace_numa(device: Device, root: Path) -> Device:
    """Return the GPU with the NUMA node that /sys shows."""
    try:
        node = int((root / "sys/bus/pci/devices" / device.bus / "numa_node").read_text())
    except (OSError, ValueError):
        return device
    return with_fields(device, numa=node if node >= 0 else None)


def check(facts: GpuFacts) -> list[Finding]:
    """Check that the GPUs can be used, and which of them are hidden."""
    if facts.error:  # the tool may also be installed on hosts without GPUs, from an image for all hosts
        return [(failure if facts.on_bus or facts.devices else warning)("devices", facts.error)]
    if not facts.devices:
        hidden = "" if not facts.variable else f"; {facts.variable_name}={facts.variable} has no effect"
        return [ok("devices", f"no GPU: ranks compute on CPU cores{hidden}")]
    names = ", ".join(f"{name} (x{sum(each.name == name for each in facts.devices)})" for name in _names(facts.devices))
    driver = f", driver {facts.driver}" if facts.driver else ""
    return [ok("devices", f"{names}{driver}"), *check_visible(facts), *_check_order(facts), *_check_memory(facts)]


def _names(devices: Sequence[Device]) -> list[str]:
    return list(dict.fromkeys(device.name for device in devices))


def check_visible(facts: GpuFacts) -> list[Finding]:
    """Check CUDA_VISIBLE_DEVICES or the variable of ROCm, and name what it hides."""
    variable = facts.variable
    count = f"{len(facts.devices)} GPU{'s' if len(facts.devices) > 1 else ''}"
    if variable is None:
        return [ok("visible-devices", f"{facts.variable_name} is not set: {count} can be used")]
    shown = f"{facts.variable_name}={variable!r}"
    wrong = _unknown_entry(facts.devices, variable)
    visible, hidden = facts.visible, [device for device in facts.devices if not device.visible]
    if wrong and visible:
        lost = ", ".join(str(device.index) for device in hidden) or "none"
        return [
            failure("visible-devices", f"{shown}: {wrong}; it and all after it are ignored, so GPU {lost} is hidden")
        ]
    if not visible:
        why = wrong or ("a GPU is named twice" if variable.strip() not in ("", "-1") else "it is empty or -1")
        return [failure("visible-devices", f"{shown} hides all {count}: {why}")]
    using = ", ".join(str(device.index) for device in visible)
    rest = f", hides GPU {', '.join(str(device.index) for device in hidden)}" if hidden else ""
    return [ok("visible-devices", f"{shown} shows GPU {using}{rest}")]


def _unknown_entry(devices: Sequence[Device], variable: str) -> str:
    """Return what is wrong with the first entry that names no GPU, or more than one; "" if there is none."""
    if variable.strip() in ("", "-1") or variable.strip().startswith("MIG-"):
        return ""
    for entry in (part.strip() for part in variable.split(",")):
        matches = sum(_means(entry, device) for device in devices)
        if not matches:
            last = devices[-1].index
            return f"there is no GPU {entry!r} (there are 0 to {last})"
        if matches > 1:
            return f"{entry!r} stands for {matches} GPUs"
    return ""


def _check_order(facts: GpuFacts) -> list[Finding]:
    names = _names(facts.devices)
    if len(names) > 1 and facts.devices[0].kind == "cuda" and facts.order != "PCI_BUS_ID":
        return [
            warning("device-order", f"{' and '.join(names)} are in one host, and CUDA_DEVICE_ORDER is not PCI_BUS_ID")
        ]
    return []


def _check_memory(facts: GpuFacts) -> list[Finding]:
    busy = [
        f"GPU {device.index} ({format_bytes(used)} of {format_bytes(device.memory)})"
        for device, used in zip(facts.devices, facts.used, strict=True)
        if device.visible and device.memory and used > _BUSY * device.memory
    ]
    if busy:
        return [warning("device-memory", f"other processes use memory of {', '.join(busy)}")]
    return [ok("device-memory", "the memory of all visible GPUs is free")] if facts.visible else []
