"""The agreement of processes that run one model together: the versions, options and model data that must be equal."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import shoal
from shoal.config.engine_options import EngineOptions, agreed
from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.models.registry import read_config
from shoal.text.tokenizer import vocabulary_files
from shoal.wire.base import WIRE_VERSION
from shoal.wire.plan import EnginePlan, ModelFiles

_DIGITS = 16


def host_agreement(options: EngineOptions, files: ModelFiles, tokenizer_folder: str) -> dict[str, str]:
    """Return what all hosts of a deployment must have in common, as name -> value or digest.

    The digest of weights covers the headers and sizes of their files, but not the numbers in them, which would take too
    long to read.

    Raises:
        CheckpointError: a model cannot be read.
    """
    found = {"version of Shoal": shoal.__version__, "wire version": str(WIRE_VERSION), **agreed(options)}
    has_weights = options.model_options.load_format != "dummy"
    overrides = options.model_options.hf_overrides or {}
    for model, folder in (("", files.folder), ("draft model's ", files.draft_folder)):
        if not folder:
            continue
        config = read_config(Path(folder), {} if model else overrides)
        found[f"{model}config.json"] = _digest([json.dumps(config, sort_keys=True).encode()])
        if has_weights:
            found[f"{model}set of weights"] = _weights_digest(Path(folder))
    if vocabulary := vocabulary_files(Path(tokenizer_folder)):
        found["tokenizer"] = _digest(file.read_bytes() for file in vocabulary)
    return found


def replica_agreement(of_host: dict[str, str], plan: EnginePlan) -> dict[str, str]:
    """Return what a replica must have in common with the other replicas of its deployment.

    For replicas that share experts it is more than what hosts compare. Their ranks exchange tokens in the start phases
    too, so all must run the same steps there: the largest steps if the KV cache is measured, and none for the warm-up
    if a sequence can only have one token.
    """
    if not plan.layout.shares_experts:
        return of_host
    measured = any(rank.kv_budget is None for rank in plan.ranks)
    return {
        **of_host,
        "size of the KV cache": "measured" if measured else "given",
        "longest sequence": "1" if plan.max_model_len == 1 else "2 and more",
    }


def _weights_digest(folder: Path) -> str:
    tensors = open_checkpoint(folder).tensors
    entries = sorted(f"{name} {entry.dtype} {entry.shape} {entry.offset}" for name, entry in tensors.items())
    sizes = sorted(str(file.stat().st_size) for file in {entry.file for entry in tensors.values()})
    return _digest(["\n".join([*entries, *sizes]).encode()])


def _digest(parts: Iterable[bytes]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()[:_DIGITS]
