"""The decoder: one model for every family, put together from its spec and a rank's weights."""

import torch
from torch import Tensor

from shoal.kernels.base import HeadLayout, Kernels, KVCache, PagedBatch, QKNorm, Rope
from shoal.kernels.linear import Linear, make_linear
from shoal.models.loader import Weights
from shoal.models.manifest import Cut, Shard
from shoal.models.rope import rope_tables
from shoal.models.spec import ModelSpec
from shoal.parallel.embedding import VocabParallelEmbedding
from shoal.parallel.linear import RowParallelLinear
from shoal.parallel.mesh import Axis


class Attention:
    def __init__(
        self, qkv: Linear, out: RowParallelLinear, norm: QKNorm | None, rope: Rope, heads: HeadLayout, kernels: Kernels
    ) -> None:
        self.qkv = qkv
        self.out = out
        self.norm = norm
        self.rope = rope
        self.heads = heads
        self.kernels = kernels
        self.scale = heads.head_dim**-0.5

    def __call__(self, x: Tensor, batch: PagedBatch, cache: KVCache) -> Tensor:
        q = self.kernels.rotate_and_store(self.qkv(x), self.heads, self.norm, self.rope, batch, cache)
        return self.out(self.kernels.attend(q, self.heads, self.scale, batch, cache))


class MLP:
    def __init__(self, gate_up: Linear, down: RowParallelLinear, kernels: Kernels) -> None:
        self.gate_up = gate_up
        self.down = down
        self.kernels = kernels

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self.kernels.silu_mul(self.gate_up(x)))


class Layer:
    def __init__(
        self, input_norm: Tensor, attention: Attention, post_norm: Tensor, mlp: MLP, eps: float, kernels: Kernels
    ) -> None:
        self.input_norm = input_norm
        self.attention = attention
        self.post_norm = post_norm
        self.mlp = mlp
        self.eps = eps
        self.kernels = kernels

    def __call__(self, x: Tensor, residual: Tensor, batch: PagedBatch, cache: KVCache) -> tuple[Tensor, Tensor]:
        """x is what the layer before adds to the residual stream; gives the same pair for the layer after."""
        x, residual = self.kernels.add_rms_norm(x, residual, self.input_norm, self.eps)
        x = self.attention(x, batch, cache)
        x, residual = self.kernels.add_rms_norm(x, residual, self.post_norm, self.eps)
        return self.mlp(x), residual


class Decoder:
    def __init__(
        self,
        embedding: VocabParallelEmbedding,
        layers: list[Layer],
        final_norm: Tensor,
        head: Linear,
        eps: float,
        kernels: Kernels,
    ) -> None:
        self.embedding = embedding
        self.layers = layers
        self.final_norm = final_norm
        self.head = head
        self.eps = eps
        self.kernels = kernels

    def hidden(self, tokens: Tensor, batch: PagedBatch, caches: list[KVCache], rows: Tensor | None) -> Tensor:
        """tokens: int64 [n]; rows: int64 [m], the tokens whose outcome is wanted (None: all). Gives [m, hidden]."""
        residual = self.embedding(tokens)
        x = torch.zeros_like(residual)
        for layer, cache in zip(self.layers, caches, strict=True):
            x, residual = layer(x, residual, batch, cache)
        if rows is not None:
            x, residual = x[rows], residual[rows]
        return self.kernels.add_rms_norm(x, residual, self.final_norm, self.eps)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [m, hidden]. This rank's share of the vocabulary: float32 [m, rows of the head]."""
        return self.head(hidden).float()


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
    heads = HeadLayout(len(shard.heads.q_range), len(shard.heads.kv_ids), spec.head_dim, shard.heads.q_to_kv)
    rope = rope_tables(spec.rope, spec.head_dim, max_positions, device)

    def tensor(name: str) -> Tensor:
        return weights.tensor(name).to(device)

    def optional(name: str) -> Tensor | None:
        found = weights.optional(name)
        return None if found is None else found.to(device)

    def column(name: str) -> Linear:
        return make_linear(tensor(f"{name}.weight"), optional(f"{name}.bias"))

    def row(name: str) -> RowParallelLinear:
        return RowParallelLinear(make_linear(tensor(f"{name}.weight"), None), optional(f"{name}.bias"), tp)

    def layer(i: int) -> Layer:
        at = f"layers.{i}."
        input_norm = tensor(f"{at}input_norm")
        qkv = column(f"{at}qkv")
        norm = QKNorm(tensor(f"{at}q_norm"), tensor(f"{at}k_norm"), spec.norm_eps) if spec.qk_norm else None
        attention = Attention(qkv, row(f"{at}out"), norm, rope, heads, kernels)
        post_norm = tensor(f"{at}post_norm")
        mlp = MLP(column(f"{at}gate_up"), row(f"{at}down"), kernels)
        return Layer(input_norm, attention, post_norm, mlp, spec.norm_eps, kernels)

    embedding = VocabParallelEmbedding(tensor("embedding"), shard.ranges[Cut.VOCAB], tp)
    layers = [layer(i) for i in range(spec.num_layers)]
    final_norm = tensor("final_norm")
    # On a GPU a tied head is the embedding itself; on a CPU it is a packed copy, and the embedding stays in the file.
    tied_in_place = spec.tie_embeddings and device.type != "cpu"
    head = make_linear(embedding.weight if tied_in_place else tensor("head"), None)
    return Decoder(embedding, layers, final_norm, head, spec.norm_eps, kernels)
