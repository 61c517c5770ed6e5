"""Which implementation runs a model: our decoder, or a module of transformers. Free of torch.

Who plans and who computes ask here, so that both see the same spec, the same tensors and the same shares.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

from shoal.errors import CheckpointError
from shoal.models import fallback, manifest
from shoal.models.fallback import FallbackSpec
from shoal.models.manifest import Param, Shard
from shoal.models.registry import read_config, read_spec, tensor_names
from shoal.models.spec import ModelSpec, Unsupported


def read_model(folder: Path, wanted: str) -> ModelSpec:
    """The spec of the model in a folder. `wanted` is `--model-impl`: auto takes our own where it knows the model.

    Raises:
        CheckpointError: config.json is missing or broken, or the implementation can't run the model.
    """
    if wanted == "transformers":
        return fallback.read(read_config(folder), str(folder))
    try:
        return read_spec(folder)
    except Unsupported as error:
        if wanted == "shoal":
            raise
        own = error
    try:
        return fallback.read(read_config(folder), str(folder))
    except CheckpointError as error:
        raise CheckpointError(f"{own}; {error}") from None


def implementation_of(spec: ModelSpec) -> Literal["shoal", "transformers"]:
    return "transformers" if isinstance(spec, FallbackSpec) else "shoal"


def params_of(spec: ModelSpec, available: Collection[str] = ()) -> tuple[Param, ...]:
    """The manifest, by the names of a checkpoint that has the tensors `available`; without any, by the usual ones."""
    if isinstance(spec, FallbackSpec):
        return fallback.manifest(spec, available)
    return manifest.manifest(spec, tensor_names(spec, available))


def shards_of(spec: ModelSpec, ranks: int, weights: Sequence[int] | None = None) -> tuple[Shard, ...]:
    """What each tensor-parallel rank holds, even or in proportion to `weights`.

    Raises:
        ConfigError: the model can't be cut over so many ranks.
    """
    shares = manifest.shards(spec, ranks, weights)
    if not isinstance(spec, FallbackSpec):
        return shares
    fallback.check_ranks(spec, ranks)
    return fallback.as_cut(spec, shares)
