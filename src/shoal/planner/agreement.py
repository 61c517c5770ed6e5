"""The agreement of processes that run one model together: the versions, options and model data that must be equal."""

import hashlib
import json
from pathlib import Path

import shoal
from shoal.config.engine_options import EngineOptions, agreed
from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.models.registry import read_config
from shoal.wire.base import WIRE_VERSION
from shoal.wire.plan import EnginePlan

_DIGITS = 16
_CACHE, _LONGEST = "size of the KV cache", "longest sequence"
RANK_KEYS = frozenset({_CACHE, _LONGEST})  # keys that a front end without ranks cannot know


def agreement(options: EngineOptions, plan: EnginePlan) -> dict[str, str]:
    """Return what all processes must have in common, as name -> value or digest.

    `RANK_KEYS` are present only for replicas that share experts with others. The digest of the weights covers the
    headers and sizes of their files, but not the numbers in them, which would take too long to read.
    """
    folder = Path(plan.model.folder)
    config = read_config(folder, json.loads(plan.model.overrides))
    found = {
        "version of Shoal": shoal.__version__,
        "wire version": str(WIRE_VERSION),
        **agreed(options),
        "dtype": plan.dtype,
        "config.json": _digest(json.dumps(config, sort_keys=True).encode()),
    }
    if plan.layout.shares_experts and plan.place.local_size:
        # Their ranks exchange tokens in the start phases too, so all must run the same steps there: the largest steps
        # if the KV cache is measured, and none for the warm-up if a sequence can only have one token.
        measured = any(rank.kv_budget is None for rank in plan.ranks)
        found[_CACHE] = "measured" if measured else "given"
        found[_LONGEST] = "1" if plan.max_model_len == 1 else "2 and more"
    if options.model_options.load_format != "dummy":
        tensors = open_checkpoint(folder).tensors
        told = sorted(f"{name} {entry.dtype} {entry.shape} {entry.offset}" for name, entry in tensors.items())
        sizes = sorted(str(file.stat().st_size) for file in {entry.file for entry in tensors.values()})
        found["set of weights"] = _digest("\n".join([*told, *sizes]).encode())
    return found


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:_DIGITS]
