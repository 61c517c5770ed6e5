"""The kernels in plain PyTorch: the reference for other implementations, and the fallback on every other device."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.kernels.base import (
    Activation,
    AttentionParams,
    ExpertPairs,
    HeadLayout,
    KVCache,
    Norm,
    PagedBatch,
    QKNorm,
    Rope,
    Routing,
)
from shoal.kernels.expert_routing import group_pairs, route
from shoal.kernels.kv_rows import read_rows, store_rows

GATHER_BYTES = 256 * 2**20  # limit for the keys and values gathered at once for decoding; one sequence may exceed it
SCORE_BYTES = 32 * 2**20  # limit for the float32 scores that attention with a softcap keeps in memory at once
WINDOW_QUERIES = 256  # queries per call of attention with a window; each reads at most this many keys for nothing

_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class ReferenceKernels:
    """The implementation of `shoal.kernels.base.Kernels` for any device, and float32, bfloat16 and float16."""

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        if norm.kind == "layer":
            return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
        wide = x.float()
        normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
        if norm.weight is None:
            return normalized.to(x.dtype)
        if norm.kind == "rms_wide":
            return (normalized * norm.weight.float()).to(x.dtype)
        return normalized.to(x.dtype) * norm.weight

    def add_norm(self, x: Tensor, residual: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        residual = x + residual
        return self.norm(residual, norm), residual

    def activate(self, x: Tensor, activation: Activation) -> Tensor:
        return _ACTIVATIONS[activation](x)

    def activate_gated(self, gate_up: Tensor, activation: Activation) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return _ACTIVATIONS[activation](gate) * up

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def scale(self, x: Tensor, factor: float) -> Tensor:
        return x * factor

    def weighted_sum(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros((len(indices), x.shape[1]), device=x.device)
        if len(x):
            for index, weight in zip(indices.unbind(1), weights.unbind(1), strict=True):
                term = x.index_select(0, index.clamp(min=0)).float() * weight.unsqueeze(1)
                total += term.masked_fill_((index < 0).unsqueeze(1), 0)  # masked, since row 0 or the weight may be NaN
        return total.to(x.dtype)

    def route(self, logits: Tensor, rule: Routing, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        return route(logits, rule, bias)

    def group_pairs(self, experts: Tensor, count: int) -> ExpertPairs:
        return group_pairs(experts, count)

    def rotate_and_store(
        self,
        qkv: Tensor,
        heads: HeadLayout,
        norm: QKNorm | None,
        rope: Rope | None,
        batch: PagedBatch,
        cache: KVCache,
    ) -> Tensor:
        counts = [heads.q_heads, heads.kv_heads, heads.kv_heads]
        parts: tuple[Tensor, ...] = qkv.view(qkv.shape[0], sum(counts), heads.head_dim).split(counts, dim=1)
        q, k, v = parts
        if norm is not None:
            q, k = self.norm(q, norm.q), self.norm(k, norm.k)
        if rope is not None:
            cos, sin = rope.cos[batch.positions].unsqueeze(1), rope.sin[batch.positions].unsqueeze(1)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        store_rows(k, batch.slots, cache.keys, cache.key_scales)
        store_rows(v, batch.slots, cache.values, cache.value_scales)
        # Without norm and rotation the queries are a view of qkv, which the caller may change.
        return q.clone(memory_format=torch.contiguous_format) if norm is None and rope is None else q

    def attend(
        self, q: Tensor, heads: HeadLayout, params: AttentionParams, batch: PagedBatch, cache: KVCache
    ) -> Tensor:
        out = q.new_empty(q.shape)
        if out.numel() > 0:
            if batch.num_single > 0:
                out[: batch.num_single] = attend_single_queries(q[: batch.num_single], heads, params, batch, cache)
            attend_multi_queries(q, heads, params, batch, cache, out, min_queries=2)
        return out.flatten(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads by the angles of their positions, in float32, rounded once.

    x: [n, heads, head_dim]; cos, sin: [n, 1, rotary_dim / 2].
    """
    half = cos.shape[-1]
    low, high = x[..., :half].float(), x[..., half : 2 * half].float()
    rotated = torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)
    return rotated if 2 * half == x.shape[-1] else torch.cat((rotated, x[..., 2 * half :]), dim=-1)


def attend_single_queries(
    q: Tensor, heads: HeadLayout, params: AttentionParams, batch: PagedBatch, cache: KVCache
) -> Tensor:
    """Compute the attention of the first `num_single` sequences, which have one query each.

    q: [b, q_heads, head_dim], and so the result. The keys of several sequences are gathered together, padded to the
    longest context: of as many sequences as fit into GATHER_BYTES.
    """
    token_bytes = 2 * max(heads.kv_heads, heads.q_heads) * heads.head_dim * q.element_size()
    if cache.keys.dtype != q.dtype:  # a part as it is stored, and with scales in float32
        stored = cache.keys.itemsize + (0 if cache.key_scales is None else 4)
        token_bytes += heads.kv_heads * heads.head_dim * stored
    if params.softcap is not None and q.dtype != torch.float32:
        token_bytes += token_bytes // q.element_size() * 4  # for copies in float32
    results, start = [], 0
    while start < batch.num_single:
        stop, longest = start, 0
        while stop < batch.num_single:
            longest = max(longest, _num_visible(batch.host_context_lens[stop], params))
            if stop > start and (stop + 1 - start) * longest * token_bytes > GATHER_BYTES:
                break
            stop += 1
        results.append(_attend_group(q[start:stop], heads, params, batch, slice(start, stop), cache))
        start = stop
    return results[0] if len(results) == 1 else torch.cat(results)


def _attend_group(
    q: Tensor, heads: HeadLayout, params: AttentionParams, batch: PagedBatch, rows: slice, cache: KVCache
) -> Tensor:
    """Compute the attention of the sequences `rows` of a batch, which have one query each."""
    longest = max(_num_visible(context, params) for context in batch.host_context_lens[rows])
    contexts = batch.context_lens[rows].long().unsqueeze(1)
    firsts = torch.zeros_like(contexts) if params.window is None else (contexts - params.window).clamp(min=0)
    positions = firsts + torch.arange(longest, device=q.device)
    visible = positions < contexts
    # The padding reads the first visible token, whose value is finite: an unused slot may contain NaN, and NaN times a
    # masked weight of zero is NaN.
    positions = torch.where(visible, positions, firsts)
    blocks = batch.block_tables[rows].long().gather(1, positions // batch.block_size)
    slots = blocks * batch.block_size + positions % batch.block_size
    keys, values = (rows.transpose(1, 2) for rows in _gather(cache, slots, q.dtype))  # [b, kv_heads, L, d]
    mask = visible[:, None, None, :]
    if has_equal_groups(heads):
        # Attention treats the query heads of one KV head as several queries of one head: no key has to be copied.
        return _attention(q.unflatten(1, (heads.kv_heads, -1)), keys, values, mask, params).flatten(1, 2)
    index = torch.tensor(heads.q_to_kv, device=q.device)
    keys, values = keys.index_select(1, index), values.index_select(1, index)
    return _attention(q.unsqueeze(2), keys, values, mask, params).squeeze(2)


def _num_visible(context: int, params: AttentionParams) -> int:
    return context if params.window is None else min(context, params.window)


def attend_multi_queries(
    q: Tensor,
    heads: HeadLayout,
    params: AttentionParams,
    batch: PagedBatch,
    cache: KVCache,
    out: Tensor,
    min_queries: int,
) -> None:
    """Compute the attention of sequences with at least `min_queries` queries, one sequence after the other.

    Writes their rows of `out`, which has the shape of q.
    """
    start = 0
    for i, (length, context) in enumerate(zip(batch.query_lens, batch.host_context_lens, strict=True)):
        if length >= min_queries:
            step = _queries_per_call(length, context, heads, params)
            for first in range(0, length, step):
                end = min(first + step, length)
                rows, seen = slice(start + first, start + end), context - (length - end)
                out[rows] = attend_sequence(
                    q[rows], heads, params, batch.block_tables[i], batch.block_size, seen, cache
                )
        start += length


def _queries_per_call(length: int, context: int, heads: HeadLayout, params: AttentionParams) -> int:
    """Return how many queries of a sequence `attend_sequence` gets per call."""
    step, keys = length, context
    if params.window is not None and params.window < context:
        step = min(step, WINDOW_QUERIES)
        keys = min(context, params.window + step - 1)
    if params.softcap is not None:
        step = min(step, max(1, SCORE_BYTES // (4 * heads.q_heads * keys)))
    return step


def attend_sequence(
    q: Tensor,
    heads: HeadLayout,
    params: AttentionParams,
    block_table: Tensor,
    block_size: int,
    context: int,
    cache: KVCache,
) -> Tensor:
    """Compute the attention of queries of one sequence, which are the last of `context` tokens.

    q: [m, q_heads, head_dim], and so the result.
    """
    length = q.shape[0]
    window = params.window if params.window is not None and params.window < context else None
    first = 0 if window is None else max(0, context - length - window + 1)
    key_positions = torch.arange(first, context, device=q.device)
    slots = block_table[key_positions // block_size].long() * block_size + key_positions % block_size
    keys, values = (rows.transpose(0, 1) for rows in _gather(cache, slots, q.dtype))  # [kv_heads, L, d]
    q = q.transpose(0, 1)
    mask = None  # a plain causal mask, which PyTorch's fused kernels have built in
    if length < context or window is not None or params.softcap is not None:
        positions = torch.arange(context - length, context, device=q.device).unsqueeze(1)
        mask = key_positions <= positions
        if window is not None:
            mask &= key_positions > positions - window
    if mask is not None and _can_fold_heads(length, heads, params):
        folded = q.reshape(heads.kv_heads, -1, heads.head_dim)
        mask = mask.repeat(heads.q_heads // heads.kv_heads, 1)
        result = _attention(folded.unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0), mask, params).view(q.shape)
    else:
        # With a mask the fused kernels of some devices need as many KV heads as query heads, so keys and values are
        # copied; a single KV head is only expanded, without a copy.
        if heads.kv_heads == 1:
            keys, values = (rows.expand(heads.q_heads, -1, -1) for rows in (keys, values))
        elif heads.q_to_kv != tuple(range(heads.kv_heads)) and not (mask is None and has_equal_groups(heads)):
            index = torch.tensor(heads.q_to_kv, device=q.device)
            keys, values = keys.index_select(0, index), values.index_select(0, index)
        result = _attention(q.unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0), mask, params).squeeze(0)
    return result.transpose(0, 1)


def _gather(cache: KVCache, slots: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the keys and values in these slots. Both are one tensor if the cache has one tensor for both."""
    keys = read_rows(cache.keys, cache.key_scales, slots, dtype)
    if cache.values is cache.keys:
        return keys, keys
    return keys, read_rows(cache.values, cache.value_scales, slots, dtype)


def _can_fold_heads(length: int, heads: HeadLayout, params: AttentionParams) -> bool:
    """Tell whether the query heads of a KV head should be computed as more queries of one head, without copied keys.

    The mask grows by that. With few queries it stays smaller than the copied keys would be, and with a softcap it is
    small compared with the scores, which are kept in memory anyway.
    """
    if not has_equal_groups(heads):
        return False
    return params.softcap is not None or length * (heads.q_heads // heads.kv_heads) <= heads.head_dim


def _attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, params: AttentionParams) -> Tensor:
    """Compute attention with PyTorch.

    q: [.., q_heads, m, d]; keys, values: [.., kv_heads, L, d]. mask: true for a visible key, broadcast to
    [.., heads, m, L]. Without a mask m is L, attention is causal, and q_heads may be a multiple of kv_heads. A softcap
    needs a mask.
    """
    if params.softcap is None or mask is None:
        return F.scaled_dot_product_attention(
            q,
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None,
            scale=params.scale,
            enable_gqa=mask is None and q.shape[-3] != keys.shape[-3],
        )
    products = (q.float() * (params.scale / params.softcap)) @ keys.float().transpose(-1, -2)
    products.tanh_().mul_(params.softcap).masked_fill_(~mask, -torch.inf)
    return (torch.softmax(products, dim=-1) @ values.float()).to(q.dtype)


def has_equal_groups(heads: HeadLayout) -> bool:
    """Tell whether the KV heads have equal groups of consecutive query heads, in the same order."""
    group, rest = divmod(heads.q_heads, heads.kv_heads) if heads.kv_heads else (0, 1)
    return rest == 0 and all(kv == i // group for i, kv in enumerate(heads.q_to_kv))
