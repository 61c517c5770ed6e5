"""The decoder: one model for every family, put together from its spec and a rank's weights."""

from functools import partial

import torch
from torch import Tensor

from shoal.kernels.base import HeadLayout, Kernels, KVCache, Norm, PagedBatch, QKNorm, Rope, Scores
from shoal.kernels.linear import Linear, make_linear
from shoal.models.embedding import Embedding, LearnedPositions
from shoal.models.layers import MLP, Attention, Layer, Norms, NormSumLayer, ParallelLayer, SerialLayer
from shoal.models.loader import Weights
from shoal.models.manifest import Cut, Shard
from shoal.models.rope import rope_tables
from shoal.models.spec import ModelSpec, NormSpec, RopeSpec
from shoal.parallel.embedding import VocabParallelEmbedding
from shoal.parallel.linear import RowParallelLinear
from shoal.parallel.mesh import Axis


class Decoder:
    def __init__(
        self,
        embedding: Embedding,
        layers: list[Layer],
        final_norm: Norm | None,
        project_out: Linear | None,
        head: Linear,
        logit_softcap: float | None,
        kernels: Kernels,
    ) -> None:
        self.embedding = embedding
        self.layers = layers
        self.final_norm = final_norm
        self.project_out = project_out
        self.head = head
        self.logit_softcap = logit_softcap
        self.kernels = kernels

    def hidden(self, tokens: Tensor, batch: PagedBatch, caches: list[KVCache], rows: Tensor | None) -> Tensor:
        """tokens: int64 [n]; rows: int64 [m], the tokens whose outcome is wanted (None: all).

        Gives [m, embedding width]: what the head reads.
        """
        residual = self.embedding(tokens, batch.positions)
        x = torch.zeros_like(residual)
        for layer, cache in zip(self.layers, caches, strict=True):
            x, residual = layer(x, residual, batch, cache)
        if rows is not None:
            x, residual = x[rows], residual[rows]
        x = self.kernels.add_norm(x, residual, self.final_norm)[0] if self.final_norm else x + residual
        return self.project_out(x) if self.project_out else x

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [m, embedding width]. This rank's share of the vocabulary: float32 [m, rows of the head]."""
        logits = self.head(hidden).float()
        if self.logit_softcap is None:
            return logits
        return logits.div_(self.logit_softcap).tanh_().mul_(self.logit_softcap)


def build_decoder(
    spec: ModelSpec,
    shard: Shard,
    tp: Axis,
    weights: Weights,
    kernels: Kernels,
    device: torch.device,
    max_positions: int,
) -> Decoder:
    """Loads layer by layer, so that at most one plain weight is in memory beside its packed form."""
    return _Builder(spec, shard, tp, weights, kernels, device, max_positions).decoder()


class _Builder:
    """Asks for the weights in the order of the manifest."""

    def __init__(
        self,
        spec: ModelSpec,
        shard: Shard,
        tp: Axis,
        weights: Weights,
        kernels: Kernels,
        device: torch.device,
        max_positions: int,
    ) -> None:
        self.spec = spec
        self.shard = shard
        self.tp = tp
        self.weights = weights
        self.kernels = kernels
        self.device = device
        self.max_positions = max_positions
        self.heads = HeadLayout(len(shard.heads.q_range), len(shard.heads.kv_ids), spec.head_dim, shard.heads.q_to_kv)
        self.ropes: dict[RopeSpec, Rope] = {}

    def decoder(self) -> Decoder:
        spec = self.spec
        tokens = VocabParallelEmbedding(self.tensor("embedding"), self.shard.ranges[Cut.VOCAB], self.tp)
        project_in = self.projection("project_in")
        embedding = Embedding(tokens, spec.embedding_scale, project_in, self.positions())
        layers = [self.layer(i) for i in range(spec.num_layers)]
        final_norm = self.norm("final_norm", spec.norm) if spec.final_norm else None
        project_out = self.projection("project_out")
        # On a GPU a tied head is the embedding itself; on a CPU it is a packed copy, and the embedding stays in the
        # file.
        tied_in_place = spec.tie_embeddings and self.device.type != "cpu"
        head = make_linear(tokens.weight if tied_in_place else self.tensor("head"), self.optional("head_bias"))
        return Decoder(embedding, layers, final_norm, project_out, head, spec.logit_softcap, self.kernels)

    def positions(self) -> LearnedPositions | None:
        offset = self.spec.position_offset
        return None if offset is None else LearnedPositions(self.tensor("positions"), offset)

    def layer(self, i: int) -> Layer:
        """A layer in the spec's layout."""
        spec, kernels, at = self.spec, self.kernels, f"layers.{i}."
        before = self.norm(f"{at}attention_norm", spec.norm) if spec.norms_before else None
        attention = self.attention(i)
        after = self.norm(f"{at}attention_out_norm", spec.norm) if spec.norms_after else None
        mlp_before = self.norm(f"{at}mlp_norm", spec.norm) if spec.norms_mlp else None
        mlp = self.mlp(at)
        if before is not None and spec.layout in ("parallel", "parallel_one"):
            return ParallelLayer(before, attention, mlp_before, mlp, kernels)
        if before is not None and mlp_before is not None and spec.layout == "norm_sum":
            return NormSumLayer(attention, before, mlp, mlp_before, kernels)
        mlp_after = self.norm(f"{at}mlp_out_norm", spec.norm) if spec.norms_after else None
        return SerialLayer(Norms(before, after, kernels), attention, Norms(mlp_before, mlp_after, kernels), mlp)

    def attention(self, i: int) -> Attention:
        spec, at = self.spec, f"layers.{i}."
        kind = spec.attention_of(i)
        qkv = self.column(f"{at}qkv")
        norm = None
        if spec.qk_norm is not None:
            norm = QKNorm(self.norm(f"{at}q_norm", spec.qk_norm), self.norm(f"{at}k_norm", spec.qk_norm))
        scores = Scores(kind.scale, kind.window, kind.softcap)
        rope = None if kind.rope is None else self.rope(kind.rope)
        return Attention(qkv, self.row(f"{at}out"), norm, rope, self.heads, scores, self.kernels)

    def mlp(self, at: str) -> MLP:
        if self.spec.gated:
            activate = partial(self.kernels.activate_gated, activation=self.spec.activation)
            return MLP(self.column(f"{at}gate_up"), activate, self.row(f"{at}down"))
        activate = partial(self.kernels.activate, activation=self.spec.activation)
        return MLP(self.column(f"{at}up"), activate, self.row(f"{at}down"))

    def norm(self, name: str, norm: NormSpec) -> Norm:
        return Norm(norm.kind, self.optional(f"{name}.weight"), self.optional(f"{name}.bias"), norm.eps)

    def rope(self, spec: RopeSpec) -> Rope:
        """The tables; layers that rotate alike share them."""
        if spec not in self.ropes:
            self.ropes[spec] = rope_tables(spec, self.spec.head_dim, self.max_positions, self.device)
        return self.ropes[spec]

    def projection(self, name: str) -> Linear | None:
        weight = self.optional(f"{name}.weight")
        return None if weight is None else make_linear(weight, None)

    def column(self, name: str) -> Linear:
        return make_linear(self.tensor(f"{name}.weight"), self.optional(f"{name}.bias"))

    def row(self, name: str) -> RowParallelLinear:
        inner = make_linear(self.tensor(f"{name}.weight"), None)
        return RowParallelLinear(inner, self.optional(f"{name}.bias"), self.tp)

    def tensor(self, name: str) -> Tensor:
        return self.weights.tensor(name).to(self.device)

    def optional(self, name: str) -> Tensor | None:
        found = self.weights.optional(name)
        return None if found is None else found.to(self.device)
