"""Reading the spec of the model in a folder. A new family is one file in `families/`, named here."""

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from shoal.errors import CheckpointError
from shoal.git_lfs import refuse_pointer
from shoal.models.config_json.overrides import apply_overrides
from shoal.models.config_json.quantization import weight_block
from shoal.models.config_json.text_part import multimodal_architecture, text_part
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
from shoal.models.spec import Config, ModelFamily, ModelSpec, TensorNames, Unsupported

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
    """Return the config.json of a model folder with `overrides` applied; for a multimodal model, that of its text part.

    Raises:
        CheckpointError: config.json is missing or is not a JSON object.
    """
    return text_part(apply_overrides(_read_json(folder), overrides))


def multimodal_architecture_of(folder: Path) -> str | None:
    """Return the architecture of the model in a folder if it is a multimodal one with a supported text part."""
    return multimodal_architecture(_read_json(folder))


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
    """Return the spec of the model in a folder.

    Raises:
        CheckpointError: config.json is missing or malformed.
        Unsupported: no family reads this architecture, the model has a feature that its family's spec can't express,
            or the weights are quantized in an unsupported way.
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
    """Return the family of an architecture. If none is named, as by `config.save_pretrained`, model_type decides."""
    for family in FAMILIES.values():
        if set(family.architectures) & set(architectures) or (not architectures and family.model_type == model_type):
            return family
    return None


def _checked(spec: ModelSpec, folder: Path) -> ModelSpec:
    where = folder / "config.json"
    if spec.num_heads % spec.num_kv_heads:
        heads = f"{spec.num_heads} attention heads are not a multiple of {spec.num_kv_heads} KV heads"
        raise CheckpointError(f"{where}: {heads}")
    rotated = any(attention.rope for attention in spec.attention)
    if rotated and spec.head_dim % 2:
        raise CheckpointError(f"{where}: head_dim must be even for rotary positions, got {spec.head_dim}")
    return spec


def _with_lengths(spec: ModelSpec, config: Config) -> ModelSpec:
    """Return the spec with the limits that its ropes set on the length of texts."""
    ropes = [attention.rope for attention in spec.attention] + [spec.latent.rope if spec.latent else None]
    steady = [rope.steady_positions for rope in ropes if rope and rope.steady_positions]
    scaled = next((rope for rope in ropes if rope and rope.kind in ("linear", "llama3", "yarn")), None)
    named, by = config.get("max_position_embeddings"), ""
    if scaled is not None and spec.max_positions != named:
        original = scaled.original_max_positions or named or round(spec.max_positions / scaled.factor)
        by = f"rope scaling {scaled.kind}: {scaled.factor:g} x {original}"
    return dataclasses.replace(spec, steady_positions=min(steady, default=None), stretched_by=by)


def tensor_names(spec: ModelSpec, available: Collection[str] = ()) -> TensorNames:
    """Return the names that a checkpoint with the tensors `available` uses, or the family's usual names without any.

    The prefix is the first one with which an embedding is found, or else a layer. The names of the head and of the
    experts are the first ones that are found. Tensors that are missing are reported later, by `manifest.check_shapes`.
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
