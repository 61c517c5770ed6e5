"""Models that no family reads: transformers' own module, with our attention, KV cache and linear layers. Free of torch.

What a spec and a manifest need is not in config.json for an arbitrary model, so it is tried out: the module is built
without weights and run once without numbers (`transformers_trial`). That names every tensor, its shape, which linear
layers its tensor-parallel plan lets us cut, and what each attention layer does; what the engine could not do rightly is
refused there, before any process is started.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shoal.errors import CheckpointError, ConfigError
from shoal.lazy import load
from shoal.models.manifest import Cut, Param, Shard
from shoal.models.rope_fields import kind_of
from shoal.models.spec import ModelSpec
from shoal.models.text_part import PREFIXES
from shoal.parallel.partition import HeadSplit

# Kinds of rope whose angles depend on a token's position alone, and those for which this holds up to an original
# length. Others change with the longest sequence of a batch.
_STEADY_ROPES = ("default", "linear", "llama3", "yarn", "proportional")
_STEADY_WITHIN = ("dynamic", "longrope")
_ATTENTION_LAYERS = ("full_attention", "sliding_attention", "attention")


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


def read(config: Mapping[str, Any], where: str) -> FallbackSpec:
    """The spec of any causal model that transformers knows. Loads torch and transformers.

    Raises:
        CheckpointError: transformers is not installed or does not know the model, or the model needs what the engine
            does not have; it says what.
    """
    architectures = config.get("architectures")
    architecture = str(architectures[0]) if architectures else ""
    if reason := _obstacle(config):
        raise refusal(where, architecture, reason)
    try:
        inspect = load("shoal.models.transformers_trial:inspect")
    except ImportError as error:
        raise refusal(where, architecture, f"{error}; install transformers") from None
    found: FallbackSpec = inspect(config, architecture, where)
    return found


def refusal(where: str, architecture: str, reason: str) -> CheckpointError:
    named = architecture or "an unnamed architecture"
    return CheckpointError(f"{where}: {named} can't run through --model-impl transformers: {reason}")


def _obstacle(config: Mapping[str, Any]) -> str | None:
    """What config.json alone says against it."""
    if config.get("quantization_config"):
        return "its weights are quantized, which is not supported"
    nested = next((key for key in ("text_config", "vision_config", "audio_config") if config.get(key)), None)
    if nested:
        return f"it has a {nested}: models of more than text are not supported"
    if config.get("is_encoder_decoder"):
        return "it has an encoder, and only decoders are supported"
    kinds = {str(kind) for kind in config.get("layer_types") or ()} - set(_ATTENTION_LAYERS)
    if kinds:
        return f"its layers of type {', '.join(sorted(kinds))} need more than a KV cache"
    kind = _unsteady_rope(config)
    if kind is not None:
        return f"rope scaling {kind} changes with the longest sequence of a batch, so results would too"
    return None


def _unsteady_rope(config: Mapping[str, Any]) -> str | None:
    """The kind of a rope whose angles are not those of a position, however short a text is."""
    for key in ("rope_parameters", "rope_scaling"):
        found = config.get(key)
        if not isinstance(found, Mapping):
            continue
        layers = [value for value in found.values() if isinstance(value, Mapping)] or [found]  # some by layer type
        for layer in layers:
            kind = "longrope" if kind_of(layer) == "su" else kind_of(layer)
            if kind not in _STEADY_ROPES and (layer is not found or kind not in _STEADY_WITHIN):
                return kind
    return None


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
