"""A model folder, opened: what its config.json says, corrected by what its weights show. Free of torch.

This is decided once, where headers are read, and then said as overrides of config.json: so the memory arithmetic, the
check of the checkpoint and every rank read the same model, whichever implementation runs it.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.models import manifest
from shoal.models.checkpoint.checkpoint import Checkpoint, TensorEntry, dtype_of, open_checkpoint, same_numbers
from shoal.models.fields import said_dtype
from shoal.models.implementation import head_name, params_of, read_model
from shoal.models.manifest import Param
from shoal.models.registry import read_config, seen_in_part
from shoal.models.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class OpenedModel:
    spec: ModelSpec
    params: tuple[Param, ...]
    state: str  # of its files; "" where weights are made up
    overrides: Mapping[str, Any]  # what stands over config.json, for whoever reads it again
    notes: tuple[str, ...] = ()  # for the log: what was found to be otherwise than config.json says


def open_model(
    folder: Path, spec: ModelSpec, wanted: str, overrides: Mapping[str, Any], *, weights: bool = True, state: str = ""
) -> OpenedModel:
    """The model in a folder, of which `spec` is what config.json says, under `overrides` and the `--model-impl` that is
    `wanted`. Without `weights` these are made up.

    Raises:
        CheckpointError: the weights are missing or broken, do not go with config.json, or are not in the `state` in
            which they were first read.
    """
    whole = seen_in_part(folder)
    notes = [] if whole is None else [f"of {whole} the text part is served: it is shown no images"]
    if not weights:
        return OpenedModel(spec, params_of(spec), "", overrides, tuple(notes))
    checkpoint = open_checkpoint(folder, overrides, state)
    named = said_dtype(read_config(folder, overrides)) is not None
    changes, found = _corrections(spec, checkpoint, dtype_named=named)
    if changes:
        overrides = {**overrides, **changes}
        spec = read_model(folder, wanted, overrides)
    params = params_of(spec, checkpoint.shapes)
    manifest.check(params, checkpoint.shapes, str(folder))
    checkpoint.check_loadable(piece.source for param in params for piece in param.pieces)
    return OpenedModel(spec, params, checkpoint.state, overrides, (*notes, *found))


def _corrections(
    spec: ModelSpec, checkpoint: Checkpoint, *, dtype_named: bool
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What config.json should say of these weights, and lines for the log."""
    changes: dict[str, Any] = {}
    notes = []
    params = params_of(spec, checkpoint.shapes)
    if not dtype_named:
        changes["dtype"] = _dtype(params, checkpoint.tensors)
        notes.append(f"config.json names no dtype: that of most of the weights is {changes['dtype']}")
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
    """The type of most bytes of the model's weights. What is quantized is of none, and is widened to bfloat16 where
    there is nothing else."""
    sources = {piece.source for param in params for piece in param.pieces} & stored.keys()
    sizes: Counter[str] = Counter()
    for entry in (stored[source] for source in sorted(sources)):
        if name := dtype_of(entry):
            sizes[name] += entry.size
    return max(sizes, key=lambda name: sizes[name], default="bfloat16")


def _embedding(params: tuple[Param, ...]) -> str:
    return next(piece.source for param in params if param.name == "embedding" for piece in param.pieces)
