"""Running a causal model of transformers, with our attention and linear layers in its module, as a `CausalModel`."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from shoal.errors import CheckpointError, EngineError
from shoal.kernels.base import AttentionParams, HeadLayout, Kernels, KVCache, PagedBatch
from shoal.kernels.kv_rows import store_rows
from shoal.kernels.linear import make_linear
from shoal.kernels.top_outputs import TopOutputs
from shoal.lazy import load
from shoal.models.causal_model import LayerWatch
from shoal.models.checkpoint.loader import Weights
from shoal.models.manifest import Cut, Piece, Shard
from shoal.models.transformers.cut_plan import (
    LinearModule,
    PassThroughBackbone,
    context_of,
    cut_layers,
    set_context,
    set_module,
)
from shoal.models.transformers.fallback_spec import FallbackSpec
from shoal.models.transformers.stages import ResidualStream, stand_ins
from shoal.models.transformers.trial import build, materialize_buffers
from shoal.parallel.embedding import VocabParallelEmbedding
from shoal.parallel.linear import RowParallelLinear
from shoal.parallel.mesh import Axis
from shoal.parallel.stages import Stage

ATTENTION_NAME = "shoal"  # under which our attention is registered with transformers


@dataclass(slots=True)
class Context:
    """The context of the attention layers of one rank's model."""

    heads: HeadLayout
    params: tuple[AttentionParams, ...]  # by layer
    kernels: Kernels
    first_layer: int = 0  # number of the first layer of the stage
    batch: PagedBatch | None = None  # of the current step
    caches: Sequence[KVCache] = ()  # of the current step, one for each layer of the stage


def paged_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: None, **_: Any
) -> tuple[Tensor, None]:
    """Store keys and values in the KV cache and return the output of attention, [1, n, q_heads, d].

    query is [1, q_heads, n, d]; key and value are [1, kv_heads, n, d]; both are rotated. A rank without heads is called
    with one head, since the module needs one; its result is not used and nothing is stored.
    """
    context: Context = context_of(module)
    heads, batch = context.heads, context.batch
    if batch is None or not heads.q_heads:
        return query.new_zeros(query.shape).transpose(1, 2), None
    cache = context.caches[module.layer_idx - context.first_layer]
    store_rows(key[0].transpose(0, 1).to(value.dtype), batch.slots, cache.keys, cache.key_scales)
    store_rows(value[0].transpose(0, 1), batch.slots, cache.values, cache.value_scales)
    q = query[0].transpose(0, 1).to(value.dtype).contiguous()
    out = context.kernels.attend(q, heads, context.params[module.layer_idx], batch, cache)
    return out.view(1, -1, heads.q_heads, heads.head_dim), None


class TransformersModel:
    """A pipeline stage of a transformers module, as a `CausalModel`.

    A forward pass has two parts: the backbone, and then the causal model, in which the backbone is replaced by one that
    returns its input. So everything that the class does to its logits is done.
    """

    def __init__(
        self,
        backbone: nn.Module,
        causal: nn.Module,
        stage: Stage,
        stream: ResidualStream,
        context: Context,
        layers: Sequence[nn.Module] = (),
    ) -> None:
        """`layers`: those of the stage, if they are in one list."""
        set_context(backbone, context)
        self.backbone = backbone
        self._layers = layers
        self._hooks: list[RemovableHandle] = []  # those that tell of layers
        self._causal = causal
        self._stage = stage
        self._stream = stream
        self._context = context

    def hidden(self, inputs: Tensor, batch: PagedBatch, caches: list[KVCache], rows: Tensor | None) -> Tensor:
        """Compute one step (see `CausalModel.hidden`). The last stage returns [m, hidden]."""
        tokens = inputs
        if not self._stage.first:
            self._stream.received = inputs.unsqueeze(0)
            tokens = batch.positions.new_zeros(len(inputs))  # their values are not used
        self._context.batch, self._context.caches = batch, caches
        out = self.backbone(input_ids=tokens.unsqueeze(0), position_ids=batch.positions.unsqueeze(0), use_cache=False)
        self._context.batch, self._context.caches = None, ()
        left, self._stream.received, self._stream.left = self._stream.left, None, None
        if left is not None:
            return left[0]
        hidden: Tensor = out[0][0]
        return hidden if rows is None else hidden[rows]

    def watch_layers(self, watch: LayerWatch | None) -> None:
        """Tell `watch` of each layer, if the layers of the module are in one list."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if watch is not None:
            for number, layer in enumerate(self._layers):
                self._hooks += _tell(layer, watch, number)

    def join(self) -> None:
        """Do nothing: such a model exchanges nothing with other replicas."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of this rank's share of the vocabulary, float32 [m, rows of the head].

        hidden: [m, hidden].
        """
        if not self._stage.last:
            raise EngineError("only the last pipeline stage has an output head")
        logits: Tensor = self._causal(inputs_embeds=hidden.unsqueeze(0), use_cache=False).logits
        return logits[0].float()

    def top_tokens(self, hidden: Tensor, start: int) -> TopOutputs | None:
        """Return None: the module gives all logits."""
        return None


def build_transformers_model(
    config: dict[str, Any],
    spec: FallbackSpec,
    shard: Shard,
    tp: Axis,
    weights: Weights,
    kernels: Kernels,
    device: torch.device,
) -> TransformersModel:
    """Load a rank's stage, tensor by tensor, so that at most one weight is in memory both plain and packed.

    Raises:
        CheckpointError: a tensor of the module is neither in the checkpoint nor computed by the module itself.
    """
    _register()
    model = build(config, spec.architecture, ATTENTION_NAME)
    materialize_buffers(model, device)
    stream = ResidualStream()
    for path, absent in stand_ins(spec, model, shard.stage, stream).items():
        set_module(model, path, absent)
    _replace_linear_layers(model, spec, shard, tp, weights, device, kernels)
    _replace_embedding_and_head(model, spec, shard, tp, weights, device)
    _load_other_tensors(model, spec, weights, device)
    layers = [model.get_submodule(f"{spec.layers}.{i}") for i in shard.stage.layers] if spec.layers else []
    backbone = model.get_submodule(spec.backbone)
    set_module(model, spec.backbone, PassThroughBackbone())
    heads = HeadLayout(len(shard.heads.q_range), len(shard.heads.kv_ids), spec.head_dim, shard.heads.q_to_kv)
    params = tuple(AttentionParams(layer.scale, layer.window, layer.softcap) for layer in spec.attention)
    context = Context(heads, params, kernels, shard.stage.layers.start)
    return TransformersModel(backbone, model, shard.stage, stream, context, layers)


def _tell(layer: nn.Module, watch: LayerWatch, number: int) -> list[RemovableHandle]:
    """Let a module tell of its beginning and its end."""
    return [
        layer.register_forward_pre_hook(lambda *_: watch.began()),
        layer.register_forward_hook(lambda *_: watch.ended(number)),
    ]


def _replace_linear_layers(
    model: nn.Module,
    spec: FallbackSpec,
    shard: Shard,
    tp: Axis,
    weights: Weights,
    device: torch.device,
    kernels: Kernels,
) -> None:
    """Replace all linear layers of torch, except the head, by ours."""
    of_head, pieces = dict(spec.paths)["head"].removesuffix(".weight"), cut_layers(spec)
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and path != of_head:
            piece = pieces.get(path)
            set_module(model, path, _linear(path, piece, spec.head_dim, shard, tp, weights, device, kernels))


def _replace_embedding_and_head(
    model: nn.Module, spec: FallbackSpec, shard: Shard, tp: Axis, weights: Weights, device: torch.device
) -> None:
    """Replace the embedding and the head by ours, on the stages that have them."""
    paths = dict(spec.paths)
    cut = {param.name: param.pieces[0].cut for param in spec.params}
    embedding = weights.optional("embedding")
    if embedding is not None:
        embedding = embedding.to(device)
        if cut["embedding"] is Cut.VOCAB:
            share = VocabParallelEmbedding(embedding, shard.ranges[Cut.VOCAB], tp)
            set_module(model, paths["embedding"].removesuffix(".weight"), EmbeddingModule(share))
        else:
            _set_tensor(model, paths["embedding"], embedding)
    head: nn.Module = nn.Identity()
    if shard.stage.last:
        bias = weights.optional("head_bias")
        tied_in_place = spec.tie_embeddings and device.type != "cpu"
        weight = embedding if tied_in_place and embedding is not None else weights.linear("head", device)
        head = LinearModule(make_linear(weight, None if bias is None else bias.to(device)))
    set_module(model, paths["head"].removesuffix(".weight"), head)


def _load_other_tensors(model: nn.Module, spec: FallbackSpec, weights: Weights, device: torch.device) -> None:
    """Load all other tensors into the module, uncut.

    Raises:
        CheckpointError: a tensor is neither in the checkpoint nor computed by the module itself.
    """
    known = dict.fromkeys(param.name for param in spec.params)
    left = {
        name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta or name in known
    }
    for name in [name for name in known if name in left]:
        _set_tensor(model, name, weights.tensor(name).to(device))
        left.discard(name)
    missing = sorted(left) + _unset_attributes(model)
    if missing:
        raise CheckpointError(
            f"{spec.architecture}: no values are known for {missing[0]} ({len(missing)} such tensors)"
        )


@cache
def _register() -> None:
    load("transformers:AttentionInterface").register(ATTENTION_NAME, paged_attention)


class EmbeddingModule(nn.Module):
    """A module around our embedding, which replaces torch's: int64 [1, n] to [1, n, hidden]."""

    def __init__(self, inner: VocabParallelEmbedding) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(tokens[0]).unsqueeze(0)


def _linear(
    path: str,
    piece: Piece | None,
    head_dim: int,
    shard: Shard,
    tp: Axis,
    weights: Weights,
    device: torch.device,
    kernels: Kernels,
) -> LinearModule:
    """Return our layer for the one at `path`: whole, cut by columns, or cut by rows with a sum over ranks after it."""
    weight = weights.linear(f"{path}.weight", device)
    bias = weights.optional(f"{path}.bias")
    bias = None if bias is None else bias.to(device)
    if piece is None:
        return LinearModule(make_linear(weight, bias))
    lacks_heads = piece.cut is not Cut.MLP and not shard.heads.q_range
    if piece.dim == 0:
        if lacks_heads:
            return LinearModule(lambda x: x.new_zeros(len(x), head_dim))
        return LinearModule(make_linear(weight, bias))
    summed = RowParallelLinear(make_linear(weight, None), bias, tp, kernels)
    return LinearModule((lambda x: summed(x[:, :0])) if lacks_heads else summed)


def _set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Set the parameter or buffer with this name."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor


def _unset_attributes(model: nn.Module) -> list[str]:
    """Return the paths of tensors without numbers that are plain attributes of modules."""
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor) and value.is_meta
    ]
