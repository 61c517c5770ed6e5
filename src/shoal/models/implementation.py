"""The implementation that runs a model: our decoder, or a module of transformers. Free of torch.

Planner and ranks both use these functions, so that they have the same spec, the same tensors and the same shards.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from shoal.errors import CheckpointError
from shoal.kernels.weight_format import QUANTIZATIONS
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
    """Return the spec of the model in a folder.

    Args:
        wanted: the value of `--model-impl`; "auto" prefers our own implementation if it supports the model.
        overrides: fields that replace those of config.json.

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


def params_of(spec: ModelSpec, available: Collection[str] = (), quantization: str = "") -> tuple[Param, ...]:
    """Return the manifest, with the names in a checkpoint that has the tensors `available`, or with the usual names.

    Args:
        quantization: the value of `--quantization`; "": weights stay as they are.
    """
    if isinstance(spec, FallbackSpec):
        params = fallback_spec.make_manifest(spec, available)
    else:
        params = manifest.make_manifest(spec, tensor_names(spec, available))
    if quantization:
        params = manifest.quantized(params, QUANTIZATIONS[quantization])
    return _read_embedding_from_head(params, head_name(spec, available), available) if spec.tie_embeddings else params


def head_name(spec: ModelSpec, available: Collection[str] = ()) -> str:
    """Return the name of the output head's weight in a checkpoint that has the tensors `available`."""
    if isinstance(spec, FallbackSpec):
        name = dict(spec.paths)["head"]
        return f"language_model.{name}" if f"language_model.{name}" in available else name
    return f"{tensor_names(spec, available).head}.weight"


def _read_embedding_from_head(params: tuple[Param, ...], head: str, available: Collection[str]) -> tuple[Param, ...]:
    """Return the manifest of a checkpoint with tied weights: if it has only the head, the embedding is read from it."""
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
    """Return the shard of each rank of a replica.

    Raises:
        ConfigError: the model can't be cut in this way.
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
    """Give each rank its whole experts, if the layout has whole experts.

    The experts of a stage are placed on its ranks in all replicas; the ranks of a replica are consecutive.
    """
    if not layout.experts or spec.moe is None:
        return shares
    placed = place_experts(spec.moe.num_experts, layout.replicas * layout.tp, layout.experts)
    mine = placed[layout.replica * layout.tp :][: layout.tp]
    return [share.with_experts(spec, experts) for share, experts in zip(shares, mine, strict=True)]


def shards_of(spec: ModelSpec, ranks: int, weights: Sequence[int] | None = None) -> tuple[Shard, ...]:
    """Return the shard of each tensor-parallel rank, even or in proportion to `weights`.

    Raises:
        ConfigError: the model can't be cut over this number of ranks.
    """
    shares = manifest.make_shards(spec, ranks, weights)
    if not isinstance(spec, FallbackSpec):
        return shares
    fallback_spec.check_ranks(spec, ranks)
    return fallback_spec.shards_as_cut(spec, shares)
