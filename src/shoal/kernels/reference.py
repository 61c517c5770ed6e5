"""The kernels in plain PyTorch: the yardstick for every other implementation, and what runs where none other does."""

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.kernels.base import HeadLayout, KVCache, PagedBatch, QKNorm, Rope

GATHER_BYTES = 256 * 2**20  # keys and values that decoding sequences gather at a time; one sequence may take more


class ReferenceKernels:
    """`shoal.kernels.base.Kernels` on any device, for float32, bfloat16 and float16."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return normalized.to(x.dtype) * weight

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        residual = x + residual
        return self.rms_norm(residual, weight, eps), residual

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def rotate_and_store(
        self, qkv: Tensor, heads: HeadLayout, norm: QKNorm | None, rope: Rope, batch: PagedBatch, cache: KVCache
    ) -> Tensor:
        n = qkv.shape[0]
        q, k, v = (
            part.reshape(n, count, heads.head_dim)
            for part, count in zip(
                qkv.split(
                    [count * heads.head_dim for count in (heads.q_heads, heads.kv_heads, heads.kv_heads)], dim=-1
                ),
                (heads.q_heads, heads.kv_heads, heads.kv_heads),
                strict=True,
            )
        )
        if norm is not None:
            q = self.rms_norm(q, norm.q_weight, norm.eps)
            k = self.rms_norm(k, norm.k_weight, norm.eps)
        cos = rope.cos[batch.positions].unsqueeze(1)
        sin = rope.sin[batch.positions].unsqueeze(1)
        cache.keys.index_copy_(0, batch.slots, rotate(k, cos, sin))
        cache.values.index_copy_(0, batch.slots, v)
        return rotate(q, cos, sin)

    def attend(self, q: Tensor, heads: HeadLayout, scale: float, batch: PagedBatch, cache: KVCache) -> Tensor:
        out = q.new_empty(q.shape)
        if out.numel() > 0:
            if batch.num_single > 0:
                out[: batch.num_single] = attend_singles(q[: batch.num_single], heads, scale, batch, cache)
            attend_runs(q, heads, scale, batch, cache, out, shortest=2)
        return out.flatten(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [n, heads, head_dim]; cos, sin: [n, 1, rotary_dim / 2]. Computes in float32, rounds once."""
    half = cos.shape[-1]
    low, high = x[..., :half].float(), x[..., half : 2 * half].float()
    turned = torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)
    return turned if 2 * half == x.shape[-1] else torch.cat((turned, x[..., 2 * half :]), dim=-1)


def attend_singles(q: Tensor, heads: HeadLayout, scale: float, batch: PagedBatch, cache: KVCache) -> Tensor:
    """The first `num_single` sequences, one query each. q: [b, q_heads, head_dim], and so the result.

    Their keys are gathered side by side, padded to the longest: as many sequences at a time as GATHER_BYTES hold.
    """
    token_bytes = 2 * max(heads.kv_heads, heads.q_heads) * heads.head_dim * q.element_size()
    results, start = [], 0
    while start < batch.num_single:
        stop, longest = start, 0
        while stop < batch.num_single:
            longest = max(longest, batch.host_context_lens[stop])
            if stop > start and (stop + 1 - start) * longest * token_bytes > GATHER_BYTES:
                break
            stop += 1
        results.append(_attend_group(q[start:stop], heads, scale, batch, slice(start, stop), cache))
        start = stop
    return results[0] if len(results) == 1 else torch.cat(results)


def _attend_group(q: Tensor, heads: HeadLayout, scale: float, batch: PagedBatch, rows: slice, cache: KVCache) -> Tensor:
    """Sequences `rows` of a batch, one query each."""
    longest = max(batch.host_context_lens[rows])
    where = torch.arange(longest, device=q.device)
    visible = where < batch.context_lens[rows].unsqueeze(1)
    # Behind the end of a context its first token stands in: it is finite, where a slot never written may hold a NaN,
    # which a masked weight of zero would not silence.
    where = torch.where(visible, where, 0)
    blocks = batch.block_tables[rows].long().gather(1, where // batch.block_size)
    slots = blocks * batch.block_size + where % batch.block_size
    keys, values = cache.keys[slots].transpose(1, 2), cache.values[slots].transpose(1, 2)  # [b, kv_heads, L, d]
    mask = visible[:, None, None, :]
    if is_regular(heads):
        # The query heads of one KV head can pose as several queries of it: no key is copied for them.
        grouped = q.unflatten(1, (heads.kv_heads, -1))
        return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale).flatten(1, 2)
    index = torch.tensor(heads.q_to_kv, device=q.device)
    keys, values = keys.index_select(1, index), values.index_select(1, index)
    return F.scaled_dot_product_attention(q.unsqueeze(2), keys, values, attn_mask=mask, scale=scale).squeeze(2)


def attend_runs(
    q: Tensor, heads: HeadLayout, scale: float, batch: PagedBatch, cache: KVCache, out: Tensor, shortest: int
) -> None:
    """Sequences with at least `shortest` queries, one call each. Writes their rows of out: [n, q_heads, head_dim]."""
    start = 0
    for i, (length, context) in enumerate(zip(batch.query_lens, batch.host_context_lens, strict=True)):
        if length >= shortest:
            rows = slice(start, start + length)
            out[rows] = attend_run(q[rows], heads, scale, batch.block_tables[i], batch.block_size, context, cache)
        start += length


def attend_run(
    q: Tensor, heads: HeadLayout, scale: float, block_table: Tensor, block_size: int, context: int, cache: KVCache
) -> Tensor:
    """The queries of one sequence, which are the last of `context` tokens. q: [m, q_heads, head_dim], as the result."""
    length = q.shape[0]
    where = torch.arange(context, device=q.device)
    slots = block_table[where // block_size].long() * block_size + where % block_size
    keys, values = cache.keys[slots].transpose(0, 1), cache.values[slots].transpose(0, 1)  # [kv_heads, L, d]
    causal = length == context
    # With a mask the fused kernels of some devices want as many key heads as query heads, so keys are copied for it.
    grouped = causal and is_regular(heads)
    if not grouped and heads.q_to_kv != tuple(range(heads.kv_heads)):
        index = torch.tensor(heads.q_to_kv, device=q.device)
        keys, values = keys.index_select(0, index), values.index_select(0, index)
    mask = None if causal else where <= torch.arange(context - length, context, device=q.device).unsqueeze(1)
    result = F.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0),
        keys.unsqueeze(0),
        values.unsqueeze(0),
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=grouped and heads.q_heads != heads.kv_heads,
    )
    return result.squeeze(0).transpose(0, 1)


def is_regular(heads: HeadLayout) -> bool:
    """Whether consecutive query heads share a KV head, equally many each, in order."""
    group, rest = divmod(heads.q_heads, heads.kv_heads) if heads.kv_heads else (0, 1)
    return rest == 0 and all(kv == i // group for i, kv in enumerate(heads.q_to_kv))
