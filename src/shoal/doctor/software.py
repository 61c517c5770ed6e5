"""Python, PyTorch and its backends, and the environment variables that change them."""

import importlib.metadata
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import shoal
from shoal import env
from shoal.config import engine_options
from shoal.devices import cuda
from shoal.doctor.kinds import failure, ok, warning
from shoal.wire.base import WIRE_VERSION
from shoal.wire.doctor import Finding

_LEAST_PYTHON = (3, 11)
_SLOW = {  # variables with the value that slows ranks down, and what it does
    "CUDA_LAUNCH_BLOCKING": ("1", "every kernel of a GPU is waited for"),
    "NCCL_P2P_DISABLE": ("1", "NCCL does not use NVLink or PCIe between GPUs"),
    "NCCL_SHM_DISABLE": ("1", "NCCL sends tensors of one host through the network"),
    "NCCL_IB_DISABLE": ("1", "NCCL does not use RDMA"),
    "NCCL_DEBUG": ("TRACE", "NCCL writes a line for each operation"),
    "TORCH_DISTRIBUTED_DEBUG": ("DETAIL", "PyTorch checks each operation on all ranks"),
}


@dataclass(frozen=True, slots=True)
class Software:
    """The installed versions, found without loading PyTorch."""

    python: tuple[int, int, int]
    torch: str = ""  # empty: it is not installed
    torch_for_gpus: bool = False
    variables: Mapping[str, str] = field(default_factory=dict)  # those that change how ranks compute and communicate
    unknown: Sequence[str] = ()  # SHOAL_* variables that nothing reads


def gather() -> Software:
    """Return the installed versions and the variables of this process."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    return Software(
        python=sys.version_info[:3],
        torch=version,
        torch_for_gpus=bool(version) and cuda.torch_has_cuda(),
        variables=env.communication_variables(),
        unknown=env.unknown_variables(option.name for option in engine_options.options()),
    )


def versions(software: Software, torch: Mapping[str, Any] | None, driver: str) -> dict[str, str]:
    """Return the versions that hosts compare."""
    found = torch or {}
    named = {
        "Shoal": shoal.__version__,
        "wire version": str(WIRE_VERSION),
        "Python": ".".join(map(str, software.python)),
        "PyTorch": str(found.get("version") or software.torch),
        "CUDA": str(found.get("cuda", "")),
        "ROCm": str(found.get("rocm", "")),
        "NCCL": str(found.get("nccl", "")),
        "driver": driver,
        "machine": platform.machine(),
    }
    return {name: text for name, text in named.items() if text}


def check(software: Software, torch: Mapping[str, Any] | None, num_gpus: int) -> list[Finding]:
    """Check the versions. `torch`: what PyTorch finds in a rank; None if no rank could load it."""
    found = [_check_python(software.python), *_check_torch(software, torch, num_gpus)]
    return [*found, *check_variables(software.variables, software.unknown)]


def _check_python(version: tuple[int, int, int]) -> Finding:
    shown = ".".join(map(str, version))
    if version < _LEAST_PYTHON:
        return failure("python-version", f"Python {shown}, Shoal needs {'.'.join(map(str, _LEAST_PYTHON))} or newer")
    return ok("python-version", f"Python {shown}, Shoal {shoal.__version__}")


def _check_torch(software: Software, torch: Mapping[str, Any] | None, num_gpus: int) -> list[Finding]:
    if not software.torch:
        return [failure("torch", "PyTorch is not installed", "pip install torch")]
    if num_gpus and not software.torch_for_gpus:
        gpus = f"{num_gpus} GPU{'s' if num_gpus > 1 else ''}"
        return [failure("torch-build", f"PyTorch {software.torch} was built for CPUs, and this host has {gpus}")]
    if torch is None:  # if ranks were tried, the findings of the all-reduce say why
        return []
    made_for = f"CUDA {torch['cuda']}" if torch["cuda"] else f"ROCm {torch['rocm']}" if torch["rocm"] else "CPUs"
    backends = ", ".join(torch["backends"]) or "none"
    found = [ok("torch", f"PyTorch {torch['version']} for {made_for}, backends: {backends}, threads")]
    if "gloo" not in torch["backends"]:
        found = [failure("torch", f"PyTorch {torch['version']} has no gloo, with which ranks on CPUs communicate")]
    seen = len(torch["devices"])
    if seen < num_gpus:
        found.append(failure("torch-devices", f"the driver shows {num_gpus} GPUs, PyTorch can use {seen}"))
    elif seen:
        found.append(ok("torch-devices", f"PyTorch can use {', '.join(dict.fromkeys(torch['devices']))} (x{seen})"))
    return found


def check_variables(variables: Mapping[str, str], unknown: Sequence[str]) -> list[Finding]:
    """Check the environment variables: those that slow ranks down, and those that nothing reads."""
    found = [
        warning("variables", f"{name}={variables[name]}: {what}", f"unset {name}")
        for name, (value, what) in _SLOW.items()
        if variables.get(name, "").upper() == value
    ]
    found += [warning("variables", f"{name}: Shoal does not know it", f"unset {name}") for name in unknown]
    names = ", ".join(sorted(variables)) or "none"
    return found or [ok("variables", f"set for communication: {names}")]
