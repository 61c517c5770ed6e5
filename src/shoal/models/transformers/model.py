"""A causal model of transformers behind the decoder's interface: its own module, our attention and linear layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from shoal.errors import CheckpointError, EngineError
from shoal.kernels.base import HeadLayout, Kernels, KVCache, PagedBatch, Scores
from shoal.kernels.linear import make_linear
from shoal.lazy import load
from shoal.models.checkpoint.loader import Weights
from shoal.models.manifest import Cut, Piece, Shard
from shoal.models.transformers.cut_plan import GivenBackbone, LinearModule, context_of, cut_layers, put, set_context
from shoal.models.transformers.fallback_spec import FallbackSpec
from shoal.models.transformers.stages import ResidualStream, stand_ins
from shoal.models.transformers.trial import build, materialize_buffers
from shoal.parallel.embedding import VocabParallelEmbedding
from shoal.parallel.linear import RowParallelLinear
from shoal.parallel.mesh import Axis
from shoal.parallel.stages import Stage

RUN = "shoal"  # our name among transformers' attention functions


@dataclass(slots=True)
class Context:
    """What the attention layers of one rank's model need to know."""

    heads: HeadLayout
    scores: tuple[Scores, ...]  # by layer
    kernels: Kernels
    first_layer: int = 0  # of the stage
    batch: PagedBatch | None = None  # of the step that is computed, and so the caches
    caches: Sequence[KVCache] = ()


def paged_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: None, **_: Any
) -> tuple[Tensor, None]:
    """query: [1, q_heads, n, d]; key, value: [1, kv_heads, n, d], rotated. Gives [1, n, q_heads, d].

    A rank without heads computes one for the module's sake; it has no cache to write to.
    """
    context: Context = context_of(module)
    heads, batch = context.heads, context.batch
    if batch is None or not heads.q_heads:
        return query.new_zeros(query.shape).transpose(1, 2), None
    cache = context.caches[module.layer_idx - context.first_layer]
    cache.keys.index_copy_(0, batch.slots, key[0].transpose(0, 1).to(cache.keys.dtype))
    cache.values.index_copy_(0, batch.slots, value[0].transpose(0, 1).to(cache.values.dtype))
    q = query[0].transpose(0, 1).to(value.dtype).contiguous()
    out = context.kernels.attend(q, heads, context.scores[module.layer_idx], batch, cache)
    return out.view(1, -1, heads.q_heads, heads.head_dim), None


class TransformersModel:
    """A stage of the model, with `shoal.models.causal_model.CausalModel`'s interface.

    A pass is taken in two: the backbone, then what the causal model does to its outcome, with a stand-in for the
    backbone. So whatever a class does to its logits is done.
    """

    def __init__(
        self, backbone: nn.Module, causal: nn.Module, stage: Stage, stream: ResidualStream, context: Context
    ) -> None:
        set_context(backbone, context)
        self.backbone = backbone
        self._causal = causal
        self._stage = stage
        self._stream = stream
        self._context = context

    def hidden(self, inputs: Tensor, batch: PagedBatch, caches: list[KVCache], rows: Tensor | None) -> Tensor:
        """As `CausalModel.hidden`; the last stage gives [m, hidden]."""
        tokens = inputs
        if not self._stage.first:
            self._stream.received = inputs.unsqueeze(0)
            tokens = batch.positions.new_zeros(len(inputs))  # nobody looks at them
        self._context.batch, self._context.caches = batch, caches
        out = self.backbone(input_ids=tokens.unsqueeze(0), position_ids=batch.positions.unsqueeze(0), use_cache=False)
        self._context.batch, self._context.caches = None, ()
        left, self._stream.received, self._stream.left = self._stream.left, None, None
        if left is not None:
            return left[0]
        hidden: Tensor = out[0][0]
        return hidden if rows is None else hidden[rows]

    def join(self) -> None:
        """It exchanges nothing with other replicas."""

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [m, hidden]. This rank's share of the vocabulary: float32 [m, rows of the head]."""
        if not self._stage.last:
            raise EngineError("only the last pipeline stage has an output head")
        logits: Tensor = self._causal(inputs_embeds=hidden.unsqueeze(0), use_cache=False).logits
        return logits[0].float()


def build_transformers_model(
    config: dict[str, Any],
    spec: FallbackSpec,
    shard: Shard,
    tp: Axis,
    weights: Weights,
    kernels: Kernels,
    device: torch.device,
) -> TransformersModel:
    """Loads the stage tensor by tensor, so that at most one plain weight is in memory beside its packed form.

    Raises:
        CheckpointError: something of the module is neither in the checkpoint nor made by the module itself.
    """
    _register()
    model = build(config, spec.architecture, RUN)
    materialize_buffers(model, device)
    stream = ResidualStream()
    for path, absent in stand_ins(spec, model, shard.stage, stream).items():
        put(model, path, absent)
    _put_layers(model, spec, shard, tp, weights, device)
    _put_ends(model, spec, shard, tp, weights, device)
    _fill(model, spec, weights, device)
    backbone = model.get_submodule(spec.backbone)
    put(model, spec.backbone, GivenBackbone())
    heads = HeadLayout(len(shard.heads.q_range), len(shard.heads.kv_ids), spec.head_dim, shard.heads.q_to_kv)
    scores = tuple(Scores(layer.scale, layer.window, layer.softcap) for layer in spec.attention)
    context = Context(heads, scores, kernels, shard.stage.layers.start)
    return TransformersModel(backbone, model, shard.stage, stream, context)


def _put_layers(
    model: nn.Module, spec: FallbackSpec, shard: Shard, tp: Axis, weights: Weights, device: torch.device
) -> None:
    """Our linear layers in the place of all of torch's but the head."""
    of_head, pieces = dict(spec.paths)["head"].removesuffix(".weight"), cut_layers(spec)
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and path != of_head:
            put(model, path, _linear(path, pieces.get(path), spec.head_dim, shard, tp, weights, device))


def _put_ends(
    model: nn.Module, spec: FallbackSpec, shard: Shard, tp: Axis, weights: Weights, device: torch.device
) -> None:
    """Embedding and head, where the stage has them."""
    paths = dict(spec.paths)
    cut = {param.name: param.pieces[0].cut for param in spec.params}
    embedding = weights.optional("embedding")
    if embedding is not None:
        embedding = embedding.to(device)
        if cut["embedding"] is Cut.VOCAB:
            share = VocabParallelEmbedding(embedding, shard.ranges[Cut.VOCAB], tp)
            put(model, paths["embedding"].removesuffix(".weight"), EmbeddingModule(share))
        else:
            _set(model, paths["embedding"], embedding)
    head: nn.Module = nn.Identity()
    if shard.stage.last:
        bias = weights.optional("head_bias")
        tied_in_place = spec.tie_embeddings and device.type != "cpu"
        weight = embedding if tied_in_place and embedding is not None else weights.tensor("head").to(device)
        head = LinearModule(make_linear(weight, None if bias is None else bias.to(device)))
    put(model, paths["head"].removesuffix(".weight"), head)


def _fill(model: nn.Module, spec: FallbackSpec, weights: Weights, device: torch.device) -> None:
    """All other tensors, as they are.

    Raises:
        CheckpointError: something is neither in the checkpoint nor made by the module itself.
    """
    known = dict.fromkeys(param.name for param in spec.params)
    left = {
        name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta or name in known
    }
    for name in [name for name in known if name in left]:
        _set(model, name, weights.tensor(name).to(device))
        left.discard(name)
    missing = sorted(left) + _loose_tensors(model)
    if missing:
        raise CheckpointError(
            f"{spec.architecture}: nothing is known to fill {missing[0]} ({len(missing)} such tensors)"
        )


@cache
def _register() -> None:
    load("transformers:AttentionInterface").register(RUN, paged_attention)


class EmbeddingModule(nn.Module):
    """Our embedding in the place of torch's: int64 [1, n] to [1, n, hidden]."""

    def __init__(self, inner: VocabParallelEmbedding) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(tokens[0]).unsqueeze(0)


def _linear(
    path: str, piece: Piece | None, head_dim: int, shard: Shard, tp: Axis, weights: Weights, device: torch.device
) -> LinearModule:
    """Our layer for torch's at `path`: whole, by columns, or by rows with a sum over ranks behind it."""
    weight = weights.tensor(f"{path}.weight").to(device)
    bias = weights.optional(f"{path}.bias")
    bias = None if bias is None else bias.to(device)
    if piece is None:
        return LinearModule(make_linear(weight, bias))
    lacks_heads = piece.cut is not Cut.MLP and not shard.heads.q_range
    if piece.dim == 0:
        if lacks_heads:
            return LinearModule(lambda x: x.new_zeros(len(x), head_dim))
        return LinearModule(make_linear(weight, bias))
    summed = RowParallelLinear(make_linear(weight, None), bias, tp)
    return LinearModule((lambda x: summed(x[:, :0])) if lacks_heads else summed)


def _set(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Puts a tensor into a module, as the parameter or buffer that has this name."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor


def _loose_tensors(model: nn.Module) -> list[str]:
    """Tensors without numbers that are plain attributes of modules."""
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor) and value.is_meta
    ]
