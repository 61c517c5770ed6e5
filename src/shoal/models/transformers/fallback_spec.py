"""The spec of a model that runs through transformers' own module, because no family reads it. Free of torch.

Such a model has our attention, KV cache and linear layers in the module of transformers. Its config.json does not have
all that a spec and a manifest need. So the module is built without weights and run once without numbers (`trial`). This
shows each tensor and its shape, which linear layers its tensor-parallel plan lets us cut, and what each attention layer
computes. A model that the engine could not run correctly is refused there, before any process is started.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shoal.errors import CheckpointError, ConfigError
from shoal.models.config_json.text_part import PREFIXES
from shoal.models.manifest import Cut, Param, Shard
from shoal.models.spec import ModelSpec
from shoal.parallel.partition import HeadSplit


@dataclass(frozen=True, slots=True)
class FallbackSpec(ModelSpec):
    """The parts of a model that the engine must know; the module of transformers knows the rest.

    Of the fields of `ModelSpec` these have the model's values: the sizes (`intermediate_size` is that of the widest
    inner layer), `attention` (scale, window and soft cap of each layer), `tie_embeddings`, `dtype`, and the limits on
    the length of texts. The other fields have no meaning.
    """

    architecture: str = ""
    backbone: str = ""  # path of the module below the head
    params: tuple[Param, ...] = ()  # all tensors; embedding, head and head_bias have these names, others their paths
    paths: tuple[tuple[str, str], ...] = ()  # path of the embedding, the head and its bias, by these names
    prefix: str = ""  # prefix of all names but the head's, which some files leave out
    cut_attention: bool = False  # attention layers are cut by heads; else every rank computes all heads
    cut_linears: int = 0  # number of linear layers that are cut over ranks, not counting the head
    uncut_reason: str = ""  # why not all layers that the plan names are cut; "" if they are
    layers: str = ""  # path of the list of layers; "" if the model can't be cut into pipeline stages
    layers_give_tuples: bool = False  # layers return tuples, of which the first element is the residual stream
    modules_before: tuple[tuple[str, int], ...] = ()  # modules that run before the layers: path, width of the output
    modules_after: tuple[str, ...] = ()  # modules that run after the layers
    one_stage: str = ""  # why it can't be cut into stages

    def describe(self, ranks: int) -> str:
        """Return a line for the log that describes how the model runs over this number of tensor-parallel ranks."""
        line = (
            f"model_impl transformers: {self.architecture} runs as transformers' module with our attention and KV cache"
        )
        why = f": {self.uncut_reason}" if self.uncut_reason else ""
        if not self.cut_linears:
            return f"{line}, on one rank{why}"
        if ranks == 1:
            return f"{line}, on one rank"
        return f"{line}, {self.cut_linears} linear layers cut by its tensor-parallel plan{why.replace(':', ';', 1)}"


def refusal(where: str, architecture: str, reason: str) -> CheckpointError:
    """Return the error for a model that can't run through transformers' module. `reason` ends its sentence."""
    named = architecture or "an unnamed architecture"
    return CheckpointError(f"{where}: {named} can't run through --model-impl transformers: {reason}")


def check_ranks(spec: FallbackSpec, ranks: int) -> None:
    """Check that the model can be cut over this number of tensor-parallel ranks.

    Raises:
        ConfigError: it can't.
    """
    if ranks > 1 and not spec.cut_linears:
        raise ConfigError(
            f"--tensor-parallel-size {ranks}: {spec.architecture} can run through transformers on one rank only, "
            f"because {spec.uncut_reason or 'no layer of it can be cut'}; use --tensor-parallel-size 1"
        )


def check_stages(spec: FallbackSpec, stages: int) -> None:
    """Check that the model can be cut into this number of pipeline stages.

    Raises:
        ConfigError: it can't.
    """
    if stages > 1 and not spec.layers:
        raise ConfigError(
            f"--pipeline-parallel-size {stages}: {spec.architecture} can run through transformers as one stage only, "
            f"because {spec.one_stage}; use --tensor-parallel-size or --data-parallel-size"
        )


def shards_as_cut(spec: FallbackSpec, shards: Sequence[Shard]) -> tuple[Shard, ...]:
    """Return the shards of ranks, where each has all heads, and all columns of MLPs, if these are not cut."""
    whole_heads = HeadSplit(
        range(spec.num_heads),
        range(spec.num_kv_heads),
        tuple(head * spec.num_kv_heads // spec.num_heads for head in range(spec.num_heads)),
    )
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    found = []
    for shard in shards:
        heads, ranges = shard.heads, dict(shard.ranges)
        if not spec.cut_attention:
            heads = whole_heads
            ranges |= {Cut.Q_HEADS: range(q), Cut.KV_HEADS: range(kv)}
        if not any(piece.cut is Cut.MLP for param in spec.params for piece in param.pieces):
            ranges[Cut.MLP] = range(spec.intermediate_size)
        found.append(dataclasses.replace(shard, heads=heads, ranges=ranges))
    return tuple(found)


def make_manifest(spec: FallbackSpec, names: Iterable[str]) -> tuple[Param, ...]:
    """Return all parameters, with the names that a checkpoint with the tensors `names` has for them.

    A checkpoint of the backbone alone has no prefix, that of a multimodal model has a longer one than the module.
    """
    known = set(names)
    if not spec.prefix:
        return spec.params

    def renamed(source: str) -> str:
        if source in known:
            return source
        bare = source.removeprefix(spec.prefix)
        others = [f"{prefix}{bare}" for prefix in ("", *PREFIXES)] if bare != source else [f"language_model.{source}"]
        return next((other for other in others if other in known), source)

    return tuple(
        dataclasses.replace(
            param,
            pieces=tuple(dataclasses.replace(piece, source=renamed(piece.source)) for piece in param.pieces),
        )
        for param in spec.params
    )
