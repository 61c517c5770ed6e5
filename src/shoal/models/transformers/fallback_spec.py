"""Models that no family reads: transformers' own module, with our attention, KV cache and linear layers. Free of torch.

What a spec and a manifest need is not in config.json for an arbitrary model, so it is tried out: the module is built
without weights and run once without numbers (`transformers_trial`). That names every tensor, its shape, which linear
layers its tensor-parallel plan lets us cut, and what each attention layer does; what the engine could not do rightly is
refused there, before any process is started.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shoal.errors import CheckpointError, ConfigError
from shoal.models.manifest import Cut, Param, Shard
from shoal.models.spec import ModelSpec
from shoal.models.text_part import PREFIXES
from shoal.parallel.partition import HeadSplit


@dataclass(frozen=True, slots=True)
class FallbackSpec(ModelSpec):
    """A model as the engine sees it; how it computes is the module's affair.

    Of `ModelSpec`'s fields the sizes, `attention` (scale, window and softcap, layer by layer), `tie_embeddings`,
    `dtype` and what is said of lengths are the model's; `intermediate_size` is its widest inner layer. The others say
    nothing.
    """

    architecture: str = ""
    backbone: str = ""  # the path of what is below the head
    params: tuple[Param, ...] = ()  # every tensor: "embedding", "head", "head_bias", and else by its path in the module
    paths: tuple[tuple[str, str], ...] = ()  # of these three: name -> path
    prefix: str = ""  # what names start with, but the head's; some files leave it out
    cut_attention: bool = False  # are attention layers cut by heads? Else every rank computes all of them
    cut_linears: int = 0  # linear layers that are cut over ranks, the head aside
    whole: str = ""  # why no more of it is cut; "" where all that its plan names is
    layers: str = ""  # the path of the list of its layers; "" where it can't be cut into pipeline stages
    layers_give_tuples: bool = False  # of which the first is the residual stream
    before: tuple[tuple[str, int], ...] = ()  # modules ahead of the layers: path, width of what they give
    behind: tuple[str, ...] = ()  # modules behind the layers
    one_stage: str = ""  # why it can't be cut into stages

    def describe(self, ranks: int) -> str:
        """One line for the log."""
        line = f"model_impl transformers: {self.architecture} runs as its own module with our attention and KV cache"
        why = f": {self.whole}" if self.whole else ""
        if not self.cut_linears:
            return f"{line}, on one rank{why}"
        if ranks == 1:
            return f"{line}, on one rank"
        return f"{line}, {self.cut_linears} linear layers cut by its tensor-parallel plan{why.replace(':', ';', 1)}"


def refusal(where: str, architecture: str, reason: str) -> CheckpointError:
    named = architecture or "an unnamed architecture"
    return CheckpointError(f"{where}: {named} can't run through --model-impl transformers: {reason}")


def check_ranks(spec: FallbackSpec, ranks: int) -> None:
    """Raises:
    ConfigError: the model can't be cut over so many ranks.
    """
    if ranks > 1 and not spec.cut_linears:
        raise ConfigError(
            f"--tensor-parallel-size {ranks}: {spec.architecture} runs through transformers on one rank only, since "
            f"{spec.whole or 'nothing of it can be cut'}; use --tensor-parallel-size 1"
        )


def check_stages(spec: FallbackSpec, stages: int) -> None:
    """Raises:
    ConfigError: the model can't be cut into so many pipeline stages.
    """
    if stages > 1 and not spec.layers:
        raise ConfigError(
            f"--pipeline-parallel-size {stages}: {spec.architecture} runs through transformers as one stage only, "
            f"since {spec.one_stage}; use --tensor-parallel-size or --data-parallel-size"
        )


def as_cut(spec: FallbackSpec, shards: Sequence[Shard]) -> tuple[Shard, ...]:
    """The shares of ranks, with all heads and all inner columns for each where these are not cut."""
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


def manifest(spec: FallbackSpec, names: Iterable[str]) -> tuple[Param, ...]:
    """Every parameter, by the names that a checkpoint has (`names`: all of them), with the module's prefix, another or
    none.

    Checkpoints of the backbone alone have no prefix, those of a model that sees images too a longer one.
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
