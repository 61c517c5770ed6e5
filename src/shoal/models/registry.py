"""From a model folder to its spec. A new family is one file in `families/` and one line here."""

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from shoal.errors import CheckpointError
from shoal.git_lfs import refuse_pointer
from shoal.models.families import (
    deepseek_v2,
    deepseek_v3,
    gemma,
    gemma2,
    gemma3,
    gpt2,
    gpt_neox,
    granitemoe,
    llama,
    mistral,
    mixtral,
    opt,
    phi,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)
from shoal.models.overrides import apply
from shoal.models.quantization import weight_block
from shoal.models.spec import Config, ModelFamily, ModelSpec, TensorNames, Unsupported
from shoal.models.text_part import text_part, whole_of

FAMILIES: dict[str, ModelFamily] = {
    "deepseek_v2": deepseek_v2.FAMILY,
    "deepseek_v3": deepseek_v3.FAMILY,
    "gemma": gemma.FAMILY,
    "gemma2": gemma2.FAMILY,
    "gemma3": gemma3.FAMILY,
    "gpt2": gpt2.FAMILY,
    "gpt_neox": gpt_neox.FAMILY,
    "granitemoe": granitemoe.FAMILY,
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "mixtral": mixtral.FAMILY,
    "opt": opt.FAMILY,
    "phi": phi.FAMILY,
    "phi3": phi3.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen2_moe": qwen2_moe.FAMILY,
    "qwen3": qwen3.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
}


def read_config(folder: Path, overrides: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """config.json of a model folder, with `overrides` in the place of what it says; of a model that sees images too,
    that of its text.

    Raises:
        CheckpointError: there is none, or it is not a JSON object.
    """
    return text_part(apply(_read_json(folder), overrides))


def seen_in_part(folder: Path) -> str | None:
    """The architecture in a folder, if it sees images too and its text alone is read."""
    return whole_of(_read_json(folder))


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    refuse_pointer(path)
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no config.json; a model is a folder in Hugging Face's format") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return config


def read_spec(folder: Path, overrides: Mapping[str, Any] = MappingProxyType({})) -> ModelSpec:
    """The spec of the model in a folder.

    Raises:
        CheckpointError: config.json is missing or broken.
        Unsupported: it names an architecture that no family reads, asks for what the family's spec can't say, or its
            weights are quantized in a way that can't be loaded.
    """
    config = read_config(folder, overrides)
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise CheckpointError(f"{folder / 'config.json'}: architectures must be a list of names, got {architectures!r}")
    weight_block(config)
    family = _family(architectures, config.get("model_type"))
    if family is None:
        supported = ", ".join(name for family in FAMILIES.values() for name in family.architectures)
        raise Unsupported(
            f"{folder}: architecture {', '.join(architectures) or 'unnamed'} is not supported; supported are "
            f"{supported}"
        )
    try:
        spec = family.read(config)
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: {type(error).__name__} {error}") from None
    return _with_lengths(_checked(spec, folder), config)


def _family(architectures: Sequence[str], model_type: Any) -> ModelFamily | None:
    """Where no architecture is named, as in what `config.save_pretrained` writes, model_type decides."""
    for family in FAMILIES.values():
        if set(family.architectures) & set(architectures) or (not architectures and family.model_type == model_type):
            return family
    return None


def _checked(spec: ModelSpec, folder: Path) -> ModelSpec:
    where = folder / "config.json"
    if spec.num_heads % spec.num_kv_heads:
        heads = f"{spec.num_heads} attention heads are no multiple of {spec.num_kv_heads} KV heads"
        raise CheckpointError(f"{where}: {heads}")
    rotated = any(attention.rope for attention in spec.attention)
    if rotated and spec.head_dim % 2:
        raise CheckpointError(f"{where}: head_dim must be even for rotary positions, got {spec.head_dim}")
    return spec


def _with_lengths(spec: ModelSpec, config: Config) -> ModelSpec:
    """The spec, with what its ropes say of the lengths of texts."""
    ropes = [attention.rope for attention in spec.attention] + [spec.latent.rope if spec.latent else None]
    steady = [rope.steady_positions for rope in ropes if rope and rope.steady_positions]
    scaled = next((rope for rope in ropes if rope and rope.kind in ("linear", "llama3", "yarn")), None)
    said, by = config.get("max_position_embeddings"), ""
    if scaled is not None and spec.max_positions != said:
        original = scaled.original_max_positions or said or round(spec.max_positions / scaled.factor)
        by = f"rope scaling {scaled.kind}: {scaled.factor:g} x {original}"
    return dataclasses.replace(spec, steady_positions=min(steady, default=None), stretched_by=by)


def tensor_names(spec: ModelSpec, available: Collection[str] = ()) -> TensorNames:
    """How a checkpoint with the tensors `available` spells the model's. Without any, as is usual for the family.

    The prefix is the first one under which there is an embedding, or else a layer, head and experts the first that
    there are: what is still missing is found by `manifest.check`.
    """
    family = FAMILIES[spec.family]
    prefixes = [p for p in family.prefixes if f"{p}{family.names.embedding}.weight" in available]
    if not prefixes:
        starts = {p: p + family.names.layer.format(i=0) for p in family.prefixes}
        prefixes = [p for p, start in starts.items() if any(name.startswith(start) for name in available)]
    heads = (head for head in family.heads if f"{head}.weight" in available)
    names = dataclasses.replace(
        family.names, prefix=next(iter(prefixes), family.prefixes[0]), head=next(heads, family.heads[0])
    )
    if spec.moe is None or True not in spec.moe.layers:
        return names
    layer = names.prefix + names.layer.format(i=spec.moe.layers.index(True))
    experts = (spelled for spelled in family.experts if layer + spelled.down.format(e=0) in available)
    return dataclasses.replace(names, experts=next(experts, family.experts[0]))
