"""What must be the same in all processes that run one model together: versions, options, the model itself."""

import hashlib
import json

import shoal
from shoal.config.engine_options import EngineOptions, agreed
from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.models.registry import read_config
from shoal.planner.layout import shares_experts
from shoal.planner.resolve import Decision
from shoal.wire.base import WIRE_VERSION

_DIGITS = 16
_CACHE, _LONGEST = "size of the KV cache", "longest sequence"
OF_RANKS = frozenset({_CACHE, _LONGEST})  # what a front end without ranks does not know


def agreement(options: EngineOptions, decision: Decision) -> dict[str, str]:
    """Name -> value or digest; `OF_RANKS` only for replicas that share experts with others. Of weights the
    headers and the files' sizes are read, not the numbers."""
    found = {
        "version of Shoal": shoal.__version__,
        "wire version": str(WIRE_VERSION),
        **agreed(options),
        "dtype": decision.dtype,
        "config.json": _digest(json.dumps(read_config(decision.folder, decision.overrides), sort_keys=True).encode()),
    }
    if shares_experts(decision.cutting) and decision.place.local_size:  # their ranks take the same steps at start too
        measured = None in decision.kv_budgets
        found[_CACHE] = "measured" if measured else "given"
        found[_LONGEST] = "1" if decision.max_model_len == 1 else "2 and more"  # 1: nothing is warmed up
    if options.model_options.load_format != "dummy":
        tensors = open_checkpoint(decision.folder).tensors
        told = sorted(f"{name} {entry.dtype} {entry.shape} {entry.offset}" for name, entry in tensors.items())
        sizes = sorted(str(file.stat().st_size) for file in {entry.file for entry in tensors.values()})
        found["set of weights"] = _digest("\n".join([*told, *sizes]).encode())
    return found


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:_DIGITS]
