"""From a model folder to its spec. A new family is one file in `families/` and one line here."""

import json
from pathlib import Path
from typing import Any

from shoal.errors import CheckpointError
from shoal.models.families import llama, qwen3
from shoal.models.spec import Family, ModelSpec, TensorNames

FAMILIES: dict[str, Family] = {"llama": llama.FAMILY, "qwen3": qwen3.FAMILY}


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder.

    Raises:
        CheckpointError: there is none, or it is not a JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no config.json; a model is a folder in Hugging Face's format") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return config


def read_spec(folder: Path) -> ModelSpec:
    """The spec of the model in a folder.

    Raises:
        CheckpointError: config.json is missing or broken, or names an architecture that no family reads.
    """
    config = read_config(folder)
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise CheckpointError(f"{folder / 'config.json'}: architectures must be a list of names, got {architectures!r}")
    for family in FAMILIES.values():
        if set(family.architectures) & set(architectures):
            try:
                spec = family.read(config)
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise CheckpointError(f"{folder / 'config.json'}: {type(error).__name__} {error}") from None
            return _checked(spec, folder)
    supported = ", ".join(name for family in FAMILIES.values() for name in family.architectures)
    raise CheckpointError(
        f"{folder}: architecture {', '.join(architectures) or 'unnamed'} is not supported; supported are {supported}"
    )


def _checked(spec: ModelSpec, folder: Path) -> ModelSpec:
    if spec.num_heads % spec.num_kv_heads:
        heads = f"{spec.num_heads} attention heads are no multiple of {spec.num_kv_heads} KV heads"
        raise CheckpointError(f"{folder / 'config.json'}: {heads}")
    if spec.head_dim % 2:
        raise CheckpointError(
            f"{folder / 'config.json'}: head_dim must be even for rotary positions, got {spec.head_dim}"
        )
    return spec


def tensor_names(spec: ModelSpec) -> TensorNames:
    return FAMILIES[spec.family].names
