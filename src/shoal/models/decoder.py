"""The decoder: one implementation for all families of models, built from a spec and a rank's weights."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from shoal.errors import EngineError
from shoal.kernels.base import AttentionParams, HeadLayout, Kernels, KVCache, Norm, PagedBatch, QKNorm, Rope
from shoal.kernels.experts import GroupedExperts
from shoal.kernels.linear import Linear, make_head_linear, make_linear
from shoal.kernels.linear_weights import LinearWeights
from shoal.kernels.top_outputs import TopLinear, TopOutputs
from shoal.models.causal_model import LayerWatch, watched
from shoal.models.checkpoint.loader import Weights
from shoal.models.layers.decoder_layer import (
    MLP,
    Attention,
    Layer,
    Norms,
    NormSumLayer,
    ParallelLayer,
    SelfAttention,
    SerialLayer,
)
from shoal.models.layers.embedding import Embedding, LearnedPositions
from shoal.models.layers.latent_attention import LatentAttention, LowRankLinear
from shoal.models.layers.moe import ExpertRouter, MoE, SharedExperts
from shoal.models.layers.rope import rope_tables
from shoal.models.manifest import Cut, Shard
from shoal.models.spec import AttentionSpec, LatentSpec, ModelSpec, MoESpec, NormSpec, RopeSpec
from shoal.parallel.dispatch import Dispatch, TensorParallelDispatch
from shoal.parallel.embedding import VocabParallelEmbedding
from shoal.parallel.linear import RowParallelLinear
from shoal.parallel.mesh import Axis


class Decoder:
    """A pipeline stage of a model: its layers, on the first stage the embedding, on the last the norm and the head.

    `project_out` leads from the hidden size to the width of the embedding, in models where they differ.
    """

    def __init__(
        self,
        embedding: Embedding | None,
        layers: list[Layer],
        final_norm: Norm | None,
        project_out: Linear | None,
        head: Linear | None,
        logit_scale: float | None,
        logit_softcap: float | None,
        dispatch: Dispatch,
        kernels: Kernels,
    ) -> None:
        self.embedding = embedding
        self.layers = layers
        self.final_norm = final_norm
        self.project_out = project_out
        self.head = head
        self.logit_scale = logit_scale
        self.logit_softcap = logit_softcap
        self.dispatch = dispatch
        self.kernels = kernels
        self._watch: LayerWatch | None = None

    def watch_layers(self, watch: LayerWatch | None) -> None:
        self._watch = watch

    @property
    def is_watched(self) -> bool:
        return self._watch is not None

    def _each_layer(self) -> Iterable[Layer]:
        return self.layers if self._watch is None else watched(self.layers, self._watch)

    def hidden(self, inputs: Tensor, batch: PagedBatch, caches: list[KVCache], rows: Tensor | None) -> Tensor:
        """Compute one step (see `CausalModel.hidden`). The last stage returns [m, embedding width]."""
        residual = self.embed(inputs, batch)
        return self.finish(*self.run_layers(torch.zeros_like(residual), residual, batch, caches), rows)

    def embed(self, inputs: Tensor, batch: PagedBatch) -> Tensor:
        """Begin a step, and return the residual stream before the first layer: [n, hidden]."""
        self.dispatch.begin_step(len(inputs))
        return inputs if self.embedding is None else self.embedding(inputs, batch.positions)

    def finish(self, x: Tensor, residual: Tensor, rows: Tensor | None) -> Tensor:
        """Return the result of `hidden` for the results of `run_layers`."""
        if self.head is None:
            return x + residual
        if rows is not None:
            x, residual = x[rows], residual[rows]
        x = self.kernels.add_norm(x, residual, self.final_norm)[0] if self.final_norm else x + residual
        return self.project_out(x) if self.project_out else x

    def run_layers(
        self, x: Tensor, residual: Tensor, batch: PagedBatch, caches: list[KVCache]
    ) -> tuple[Tensor, Tensor]:
        """Compute all layers. Of arguments and of results the sum, x + residual, is the residual stream."""
        for layer, cache in zip(self._each_layer(), caches, strict=True):
            x, residual = layer(x, residual, batch, cache)
        return x, residual

    def join(self) -> None:
        """Take part in a step without tokens (see `CausalModel.join`). Only mixtures of experts have work."""
        self.dispatch.begin_step(0)
        for layer in self._each_layer():
            layer.join()

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of this rank's share of the vocabulary (see `CausalModel.logits`).

        hidden: [m, embedding width].
        """
        if self.head is None:
            raise EngineError("only the last pipeline stage has an output head")
        logits = self.head(hidden)
        if self.logit_scale is None and self.logit_softcap is None:
            return logits
        logits = logits.float()
        if self.logit_scale is not None:
            logits = logits.mul_(self.logit_scale)
        if self.logit_softcap is None:
            return logits
        return logits.div_(self.logit_softcap).tanh_().mul_(self.logit_softcap)

    def top_tokens(self, hidden: Tensor, start: int) -> TopOutputs | None:
        """Return the largest logit of each row and its token (see `CausalModel.top_tokens`)."""
        plain = self.logit_scale is None and self.logit_softcap is None
        return self.head.top(hidden, start) if plain and isinstance(self.head, TopLinear) else None


def build_decoder(
    spec: ModelSpec,
    shard: Shard,
    tp: Axis,
    weights: Weights,
    kernels: Kernels,
    device: torch.device,
    max_positions: int,
    dispatch: Dispatch | None = None,
) -> Decoder:
    """Load a rank's stage, tensor by tensor, so that at most one weight is in memory both plain and packed.

    Args:
        max_positions: the number of positions for which tables of rotary angles are made.
        dispatch: how tokens reach the experts of a mixture. None: each expert is cut over the ranks of `tp`.
    """
    dispatch = dispatch or TensorParallelDispatch(tp)
    return _Builder(spec, shard, tp, weights, kernels, device, max_positions, dispatch).decoder()


class _Builder:
    """Builds a `Decoder`. It asks for the weights in the order of the manifest."""

    def __init__(
        self,
        spec: ModelSpec,
        shard: Shard,
        tp: Axis,
        weights: Weights,
        kernels: Kernels,
        device: torch.device,
        max_positions: int,
        dispatch: Dispatch,
    ) -> None:
        self.spec = spec
        self.shard = shard
        self.tp = tp
        self.weights = weights
        self.kernels = kernels
        self.device = device
        self.max_positions = max_positions
        self.dispatch = dispatch
        self.heads = HeadLayout(len(shard.heads.q_range), len(shard.heads.kv_ids), spec.head_dim, shard.heads.q_to_kv)
        self.ropes: dict[RopeSpec, Rope] = {}

    def decoder(self) -> Decoder:
        spec = self.spec
        embedding = self.embedding() if self.shard.stage.first else None
        layers = [self.layer(i) for i in self.shard.stage.layers]
        if not self.shard.stage.last:
            return Decoder(embedding, layers, None, None, None, None, None, self.dispatch, self.kernels)
        final_norm = self.norm("final_norm", spec.norm) if spec.final_norm else None
        project_out = self.projection("project_out")
        head = make_linear(self.head(embedding), self.optional("head_bias"))
        return Decoder(
            embedding,
            layers,
            final_norm,
            project_out,
            head,
            spec.logit_scale,
            spec.logit_softcap,
            self.dispatch,
            self.kernels,
        )

    def embedding(self) -> Embedding:
        tokens = VocabParallelEmbedding(self.tensor("embedding"), self.shard.ranges[Cut.VOCAB], self.tp)
        project_in = self.projection("project_in")
        return Embedding(tokens, self.spec.embedding_scale, project_in, self.positions())

    def head(self, embedding: Embedding | None) -> Tensor | LinearWeights:
        """Return the weight of the head. If it is tied, it is the embedding's tensor on a GPU, and a copy on a CPU.

        On a CPU the copy is packed for oneDNN; on a GPU a stage without the embedding needs a copy too.
        """
        tied_in_place = self.spec.tie_embeddings and self.device.type != "cpu"
        return embedding.tokens.weight if tied_in_place and embedding is not None else self.linear("head")

    def positions(self) -> LearnedPositions | None:
        offset = self.spec.position_offset
        return None if offset is None else LearnedPositions(self.tensor("positions"), offset)

    def layer(self, i: int) -> Layer:
        """Build layer `i` in the layout of the spec."""
        spec, kernels, at = self.spec, self.kernels, f"layers.{i}."
        before = self.norm(f"{at}attention_norm", spec.norm) if spec.norms_before else None
        attention = self.attention(i)
        after = self.norm(f"{at}attention_out_norm", spec.norm) if spec.norms_after else None
        mlp_before = self.norm(f"{at}mlp_norm", spec.norm) if spec.norms_mlp else None
        if before is not None and spec.layout in ("parallel", "parallel_one"):
            return ParallelLayer(before, attention, mlp_before, self.mlp(at), kernels)
        moe = spec.moe_of(i)
        mlp = self.mlp(at) if moe is None else self.mixture(moe, at)
        if before is not None and mlp_before is not None and spec.layout == "norm_sum":
            return NormSumLayer(attention, before, mlp, mlp_before, kernels)
        mlp_after = self.norm(f"{at}mlp_out_norm", spec.norm) if spec.norms_after else None
        attention_norms = Norms(before, after, kernels, spec.residual_scale)
        mlp_norms = Norms(mlp_before, mlp_after, kernels, spec.residual_scale)
        return SerialLayer(attention_norms, attention, mlp_norms, mlp)

    def attention(self, i: int) -> SelfAttention:
        spec, at = self.spec, f"layers.{i}."
        kind = spec.attention_of(i)
        if spec.latent is not None:
            return self.latent_attention(spec.latent, kind, at)
        qkv = self.column(f"{at}qkv")
        norm = None
        if spec.qk_norm is not None:
            norm = QKNorm(self.norm(f"{at}q_norm", spec.qk_norm), self.norm(f"{at}k_norm", spec.qk_norm))
        params = AttentionParams(kind.scale, kind.window, kind.softcap)
        rope = None if kind.rope is None else self.rope(kind.rope)
        return Attention(qkv, self.row(f"{at}out"), norm, rope, self.heads, params, self.kernels)

    def latent_attention(self, latent: LatentSpec, kind: AttentionSpec, at: str) -> LatentAttention:
        return LatentAttention(
            latent,
            self.latent_queries(latent, at),
            self.column(f"{at}kv_down"),
            self.norm(f"{at}kv_norm", latent.norm),
            make_head_linear(self.by_head(f"{at}k_up", latent.nope_dim).transpose(1, 2)),
            make_head_linear(self.by_head(f"{at}v_up", latent.value_dim)),
            self.row(f"{at}out"),
            self.rope(latent.rope),
            self.heads,
            AttentionParams(kind.scale, kind.window, kind.softcap),
            self.kernels,
        )

    def latent_queries(self, latent: LatentSpec, at: str) -> Linear:
        if latent.q_rank is None:
            return self.column(f"{at}q_up")
        down, norm = self.column(f"{at}q_down"), self.norm(f"{at}q_norm", latent.norm)
        return LowRankLinear(down, norm, self.column(f"{at}q_up"), self.kernels)

    def by_head(self, name: str, rows: int) -> Tensor:
        """Return a weight whose rows belong to heads as [heads of this rank, rows, columns]."""
        weight = self.tensor(f"{name}.weight")
        return weight.view(self.heads.q_heads, rows, weight.shape[1])

    def mlp(self, at: str) -> MLP:
        up, activate = self.expansion()
        return MLP(self.column(f"{at}{up}"), activate, self.row(f"{at}down"))

    def expansion(self) -> tuple[str, Callable[[Tensor], Tensor]]:
        """Return the name of the up projection, and the activation that is applied to its output."""
        kernels, activation = self.kernels, self.spec.activation
        if self.spec.gated:
            return "gate_up", partial(kernels.activate_gated, activation=activation)
        return "up", partial(kernels.activate, activation=activation)

    def mixture(self, moe: MoESpec, at: str) -> MoE:
        bias = self.optional(f"{at}correction_bias")
        router = ExpertRouter(self.column(f"{at}router"), bias, moe.routing, self.kernels)
        up, activate = self.expansion()
        held = range(moe.num_experts) if self.shard.experts is None else self.shard.experts
        matrices = [(self.column(f"{at}experts.{e}.{up}"), self.column(f"{at}experts.{e}.down")) for e in held]
        experts = GroupedExperts([u for u, _ in matrices], activate, [down for _, down in matrices], self.kernels)
        shared = None
        if moe.shared_size:
            matrix, down = self.column(f"{at}shared.{up}"), self.column(f"{at}shared.down")
            shared = SharedExperts(matrix, activate, down, self.projection(f"{at}shared_gate"))
        no_tokens = torch.empty((0, self.spec.hidden_size), dtype=self.weights.dtype, device=self.device)
        return MoE(router, experts, shared, self.dispatch, no_tokens)

    def norm(self, name: str, norm: NormSpec) -> Norm:
        return Norm(norm.kind, self.optional(f"{name}.weight"), self.optional(f"{name}.bias"), norm.eps)

    def rope(self, spec: RopeSpec) -> Rope:
        """Return the tables of rotary angles, which layers with the same rope share."""
        if spec not in self.ropes:
            self.ropes[spec] = rope_tables(spec, self.spec.head_dim, self.max_positions, self.device)
        return self.ropes[spec]

    def projection(self, name: str) -> Linear | None:
        weight = self.optional(f"{name}.weight")
        return None if weight is None else make_linear(weight, None)

    def column(self, name: str) -> Linear:
        return make_linear(self.linear(f"{name}.weight"), self.optional(f"{name}.bias"))

    def row(self, name: str) -> RowParallelLinear:
        inner = make_linear(self.linear(f"{name}.weight"), None)
        return RowParallelLinear(inner, self.optional(f"{name}.bias"), self.tp, self.kernels)

    def linear(self, name: str) -> Tensor | LinearWeights:
        return self.weights.linear(name, self.device)

    def tensor(self, name: str) -> Tensor:
        return self.weights.tensor(name).to(self.device)

    def optional(self, name: str) -> Tensor | None:
        found = self.weights.optional(name)
        return None if found is None else found.to(self.device)
