"""Opening a model folder: its config.json is read, and corrected by what the weights show. Free of torch.

This is decided once, where the headers of the weights are read. The corrections become overrides of config.json, so
that the memory arithmetic, the check of the checkpoint and every rank read the same model, in any implementation.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.models import manifest
from shoal.models.checkpoint.checkpoint import Checkpoint, TensorEntry, dtype_of, open_checkpoint, same_numbers
from shoal.models.config_json.fields import named_dtype
from shoal.models.implementation import head_name, params_of, read_model
from shoal.models.manifest import Param
from shoal.models.registry import multimodal_architecture_of, read_config
from shoal.models.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A model whose config.json and headers were read and checked."""

    spec: ModelSpec
    params: tuple[Param, ...]
    state: str  # digest of the state of its files (`Checkpoint.state`); "" for dummy weights
    overrides: Mapping[str, Any]  # overrides of config.json; every process that reads it again must use them
    notes: tuple[str, ...] = ()  # lines for the log: how the weights differ from config.json


def open_model(
    folder: Path,
    spec: ModelSpec,
    wanted: str,
    overrides: Mapping[str, Any],
    *,
    weights: bool = True,
    state: str = "",
    quantization: str = "",
) -> OpenedModel:
    """Open the model in a folder.

    Args:
        spec: the model as config.json describes it, with `overrides` applied.
        wanted: the value of `--model-impl`.
        weights: False for dummy weights; then no weights are read.
        state: the state of the files when they were first read; "" if they were not read before.
        quantization: how weights of linear layers are kept (`params_of`).

    Raises:
        CheckpointError: the weights are missing or malformed, do not match config.json, or are no longer in `state`.
    """
    multimodal = multimodal_architecture_of(folder)
    notes = [] if multimodal is None else [f"only the text part of {multimodal} is served; it reads no images"]
    if not weights:
        return OpenedModel(spec, params_of(spec, quantization=quantization), "", overrides, tuple(notes))
    checkpoint = open_checkpoint(folder, overrides, state)
    named = named_dtype(read_config(folder, overrides)) is not None
    changes, found = _corrections(spec, checkpoint, dtype_named=named)
    if changes:
        overrides = {**overrides, **changes}
        spec = read_model(folder, wanted, overrides)
    params = params_of(spec, checkpoint.shapes, quantization)
    manifest.check_shapes(params, checkpoint.shapes, str(folder))
    checkpoint.check_loadable(piece.source for param in params for piece in param.pieces)
    return OpenedModel(spec, params, checkpoint.state, overrides, (*notes, *found))


def _corrections(
    spec: ModelSpec, checkpoint: Checkpoint, *, dtype_named: bool
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the overrides that make config.json agree with the weights, and lines for the log."""
    changes: dict[str, Any] = {}
    notes = []
    params = params_of(spec, checkpoint.shapes)
    if not dtype_named:
        changes["dtype"] = _dtype(params, checkpoint.tensors)
        notes.append(f"config.json names no dtype; using {changes['dtype']}, the type of most weights")
    head, embedding = head_name(spec, checkpoint.shapes), _embedding(params)
    stored = checkpoint.tensors
    if spec.tie_embeddings and {head, embedding} <= stored.keys() and not same_numbers(stored[head], stored[embedding]):
        changes["tie_word_embeddings"] = False
        notes.append(
            f"config.json ties the output head to the embedding, but {head} is stored and is not {embedding}: the "
            "stored head is used, as with tie_word_embeddings false"
        )
    return changes, tuple(notes)


def _dtype(params: tuple[Param, ...], stored: Mapping[str, TensorEntry]) -> str:
    """Return the type of most bytes of the weights that are not quantized, or bfloat16 if all are quantized."""
    sources = {piece.source for param in params for piece in param.pieces} & stored.keys()
    sizes: Counter[str] = Counter()
    for entry in (stored[source] for source in sorted(sources)):
        if name := dtype_of(entry):
            sizes[name] += entry.size
    return max(sizes, key=lambda name: sizes[name], default="bfloat16")


def _embedding(params: tuple[Param, ...]) -> str:
    return next(piece.source for param in params if param.name == "embedding" for piece in param.pieces)
