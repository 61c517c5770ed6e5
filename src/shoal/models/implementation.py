"""Which implementation runs a model: our decoder, or a module of transformers. Free of torch.

Who plans and who computes ask here, so that both see the same spec, the same tensors and the same shares.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from shoal.errors import CheckpointError
from shoal.models import manifest
from shoal.models.manifest import Param, Shard
from shoal.models.registry import read_config, read_spec, tensor_names
from shoal.models.spec import ModelSpec, Unsupported
from shoal.models.transformers import fallback_spec
from shoal.models.transformers.fallback_spec import FallbackSpec
from shoal.models.transformers.read_spec import read_fallback_spec
from shoal.parallel.expert_placement import place_experts
from shoal.parallel.stages import make_stages
from shoal.wire.plan import Layout


def read_model(folder: Path, wanted: str, overrides: Mapping[str, Any] = MappingProxyType({})) -> ModelSpec:
    """The spec of the model in a folder. `wanted` is `--model-impl`: auto takes our own where it knows the model.
    `overrides` stand over config.json.

    Raises:
        CheckpointError: config.json is missing or broken, or the implementation can't run the model.
    """
    if wanted == "transformers":
        return read_fallback_spec(read_config(folder, overrides), str(folder))
    try:
        return read_spec(folder, overrides)
    except Unsupported as error:
        if wanted == "shoal":
            raise
        own = error
    try:
        return read_fallback_spec(read_config(folder, overrides), str(folder))
    except CheckpointError as error:
        raise CheckpointError(f"{own}; {error}") from None


def implementation_of(spec: ModelSpec) -> Literal["shoal", "transformers"]:
    return "transformers" if isinstance(spec, FallbackSpec) else "shoal"


def params_of(spec: ModelSpec, available: Collection[str] = ()) -> tuple[Param, ...]:
    """The manifest, by the names of a checkpoint that has the tensors `available`; without any, by the usual ones."""
    if isinstance(spec, FallbackSpec):
        params = fallback_spec.manifest(spec, available)
    else:
        params = manifest.manifest(spec, tensor_names(spec, available))
    return _tied_the_other_way(params, head_name(spec, available), available) if spec.tie_embeddings else params


def head_name(spec: ModelSpec, available: Collection[str] = ()) -> str:
    """What a checkpoint that has the tensors `available` calls the weight of an output head of its own."""
    if isinstance(spec, FallbackSpec):
        name = dict(spec.paths)["head"]
        return f"language_model.{name}" if f"language_model.{name}" in available else name
    return f"{tensor_names(spec, available).head}.weight"


def _tied_the_other_way(params: tuple[Param, ...], head: str, available: Collection[str]) -> tuple[Param, ...]:
    """Some files keep only the head of the two: then it is the embedding as well."""
    source = next(piece.source for param in params if param.name == "embedding" for piece in param.pieces)
    if source in available or head not in available:
        return params
    return tuple(
        dataclasses.replace(
            param,
            pieces=tuple(
                dataclasses.replace(piece, source=head) if piece.source == source else piece for piece in param.pieces
            ),
        )
        for param in params
    )


def rank_shards(spec: ModelSpec, layout: Layout) -> tuple[Shard, ...]:
    """What each rank of a replica holds.

    Raises:
        ConfigError: the model can't be cut so.
    """
    if isinstance(spec, FallbackSpec):
        fallback_spec.check_stages(spec, len(layout.stages or (spec.num_layers,)))
    shares = _with_experts(spec, shards_of(spec, layout.tp, layout.tp_split or None), layout)
    return tuple(
        dataclasses.replace(share, stage=stage)
        for stage in make_stages(layout.stages or (spec.num_layers,))
        for share in shares
    )


def _with_experts(spec: ModelSpec, shares: Sequence[Shard], layout: Layout) -> Sequence[Shard]:
    """A stage's ranks in all replicas share its experts; those of one replica follow each other."""
    if not layout.experts or spec.moe is None:
        return shares
    placed = place_experts(spec.moe.num_experts, layout.replicas * layout.tp, layout.experts)
    mine = placed[layout.replica * layout.tp :][: layout.tp]
    return [share.with_experts(spec, experts) for share, experts in zip(shares, mine, strict=True)]


def shards_of(spec: ModelSpec, ranks: int, weights: Sequence[int] | None = None) -> tuple[Shard, ...]:
    """What each tensor-parallel rank holds, even or in proportion to `weights`.

    Raises:
        ConfigError: the model can't be cut over so many ranks.
    """
    shares = manifest.shards(spec, ranks, weights)
    if not isinstance(spec, FallbackSpec):
        return shares
    fallback_spec.check_ranks(spec, ranks)
    return fallback_spec.shards_as_cut(spec, shares)
