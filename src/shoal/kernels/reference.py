"""The kernels in plain PyTorch: the yardstick for every other implementation, and what runs where none other does."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.kernels.base import Activation, HeadLayout, KVCache, Norm, PagedBatch, QKNorm, Rope, Scores

GATHER_BYTES = 256 * 2**20  # keys and values that decoding sequences gather at a time; one sequence may take more
SCORE_BYTES = 32 * 2**20  # float32 scores of a run that are held at a time where they are written out (softcap)
WINDOW_QUERIES = 256  # queries of a run taken together under a window: each reads this many keys in vain at most

_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class ReferenceKernels:
    """`shoal.kernels.base.Kernels` on any device, for float32, bfloat16 and float16."""

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

    def weighted_sum(self, x: Tensor, places: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros((len(places), x.shape[1]), device=x.device)
        if len(x):
            for place, weight in zip(places.unbind(1), weights.unbind(1), strict=True):
                term = x.index_select(0, place.clamp(min=0)).float() * weight.unsqueeze(1)
                total += term.masked_fill_((place < 0).unsqueeze(1), 0)  # the row at 0 may have no number
        return total.to(x.dtype)

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
        cache.keys.index_copy_(0, batch.slots, k)
        cache.values.index_copy_(0, batch.slots, v)
        # Neither normalized nor rotated, the queries would be a view of qkv.
        return q.clone(memory_format=torch.contiguous_format) if norm is None and rope is None else q

    def attend(self, q: Tensor, heads: HeadLayout, scores: Scores, batch: PagedBatch, cache: KVCache) -> Tensor:
        out = q.new_empty(q.shape)
        if out.numel() > 0:
            if batch.num_single > 0:
                out[: batch.num_single] = attend_singles(q[: batch.num_single], heads, scores, batch, cache)
            attend_runs(q, heads, scores, batch, cache, out, shortest=2)
        return out.flatten(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [n, heads, head_dim]; cos, sin: [n, 1, rotary_dim / 2]. Computes in float32, rounds once."""
    half = cos.shape[-1]
    low, high = x[..., :half].float(), x[..., half : 2 * half].float()
    turned = torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)
    return turned if 2 * half == x.shape[-1] else torch.cat((turned, x[..., 2 * half :]), dim=-1)


def attend_singles(q: Tensor, heads: HeadLayout, scores: Scores, batch: PagedBatch, cache: KVCache) -> Tensor:
    """The first `num_single` sequences, one query each. q: [b, q_heads, head_dim], and so the result.

    Their keys are gathered side by side, padded to the longest: as many sequences at a time as GATHER_BYTES hold.
    """
    token_bytes = 2 * max(heads.kv_heads, heads.q_heads) * heads.head_dim * q.element_size()
    if scores.softcap is not None and q.dtype != torch.float32:
        token_bytes += token_bytes // q.element_size() * 4  # copies in float32
    results, start = [], 0
    while start < batch.num_single:
        stop, longest = start, 0
        while stop < batch.num_single:
            longest = max(longest, _tokens_seen(batch.host_context_lens[stop], scores))
            if stop > start and (stop + 1 - start) * longest * token_bytes > GATHER_BYTES:
                break
            stop += 1
        results.append(_attend_group(q[start:stop], heads, scores, batch, slice(start, stop), cache))
        start = stop
    return results[0] if len(results) == 1 else torch.cat(results)


def _attend_group(
    q: Tensor, heads: HeadLayout, scores: Scores, batch: PagedBatch, rows: slice, cache: KVCache
) -> Tensor:
    """Sequences `rows` of a batch, one query each."""
    longest = max(_tokens_seen(context, scores) for context in batch.host_context_lens[rows])
    contexts = batch.context_lens[rows].long().unsqueeze(1)
    firsts = torch.zeros_like(contexts) if scores.window is None else (contexts - scores.window).clamp(min=0)
    where = firsts + torch.arange(longest, device=q.device)
    visible = where < contexts
    # Behind the end of a context its first visible token stands in: it is finite, where a slot never written may hold
    # a NaN, which a masked weight of zero would not silence.
    where = torch.where(visible, where, firsts)
    blocks = batch.block_tables[rows].long().gather(1, where // batch.block_size)
    slots = blocks * batch.block_size + where % batch.block_size
    keys, values = (rows.transpose(1, 2) for rows in _gather(cache, slots))  # [b, kv_heads, L, d]
    mask = visible[:, None, None, :]
    if is_regular(heads):
        # The query heads of one KV head can pose as several queries of it: no key is copied for them.
        return _attention(q.unflatten(1, (heads.kv_heads, -1)), keys, values, mask, scores).flatten(1, 2)
    index = torch.tensor(heads.q_to_kv, device=q.device)
    keys, values = keys.index_select(1, index), values.index_select(1, index)
    return _attention(q.unsqueeze(2), keys, values, mask, scores).squeeze(2)


def _tokens_seen(context: int, scores: Scores) -> int:
    return context if scores.window is None else min(context, scores.window)


def attend_runs(
    q: Tensor, heads: HeadLayout, scores: Scores, batch: PagedBatch, cache: KVCache, out: Tensor, shortest: int
) -> None:
    """Sequences with at least `shortest` queries, one after the other. Writes their rows of out, which is like q."""
    start = 0
    for i, (length, context) in enumerate(zip(batch.query_lens, batch.host_context_lens, strict=True)):
        if length >= shortest:
            step = _queries_at_a_time(length, context, heads, scores)
            for first in range(0, length, step):
                end = min(first + step, length)
                rows, seen = slice(start + first, start + end), context - (length - end)
                out[rows] = attend_run(q[rows], heads, scores, batch.block_tables[i], batch.block_size, seen, cache)
        start += length


def _queries_at_a_time(length: int, context: int, heads: HeadLayout, scores: Scores) -> int:
    """How many queries of a run `attend_run` gets at once."""
    step, keys = length, context
    if scores.window is not None and scores.window < context:
        step = min(step, WINDOW_QUERIES)
        keys = min(context, scores.window + step - 1)
    if scores.softcap is not None:
        step = min(step, max(1, SCORE_BYTES // (4 * heads.q_heads * keys)))
    return step


def attend_run(
    q: Tensor, heads: HeadLayout, scores: Scores, block_table: Tensor, block_size: int, context: int, cache: KVCache
) -> Tensor:
    """The queries of one sequence, which are the last of `context` tokens. q: [m, q_heads, head_dim], as the result."""
    length = q.shape[0]
    window = scores.window if scores.window is not None and scores.window < context else None
    first = 0 if window is None else max(0, context - length - window + 1)
    where = torch.arange(first, context, device=q.device)
    slots = block_table[where // block_size].long() * block_size + where % block_size
    keys, values = (rows.transpose(0, 1) for rows in _gather(cache, slots))  # [kv_heads, L, d]
    q = q.transpose(0, 1)
    mask = None  # as causal as can be: the kernels that know so need none
    if length < context or window is not None or scores.softcap is not None:
        positions = torch.arange(context - length, context, device=q.device).unsqueeze(1)
        mask = where <= positions
        if window is not None:
            mask &= where > positions - window
    if mask is not None and _heads_pose(length, heads, scores):
        posing = q.reshape(heads.kv_heads, -1, heads.head_dim)
        mask = mask.repeat(heads.q_heads // heads.kv_heads, 1)
        result = _attention(posing.unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0), mask, scores).view(q.shape)
    else:
        # With a mask the fused kernels of some devices want as many key heads as query heads: keys are copied for them,
        # but a single one is only said to be so many.
        if heads.kv_heads == 1:
            keys, values = (rows.expand(heads.q_heads, -1, -1) for rows in (keys, values))
        elif heads.q_to_kv != tuple(range(heads.kv_heads)) and not (mask is None and is_regular(heads)):
            index = torch.tensor(heads.q_to_kv, device=q.device)
            keys, values = keys.index_select(0, index), values.index_select(0, index)
        result = _attention(q.unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0), mask, scores).squeeze(0)
    return result.transpose(0, 1)


def _gather(cache: KVCache, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values, which may be the same."""
    keys = cache.keys[slots]
    return keys, keys if cache.values is cache.keys else cache.values[slots]


def _heads_pose(length: int, heads: HeadLayout, scores: Scores) -> bool:
    """Whether the query heads of one KV head pose as more queries of it, so that no key is copied for them.

    The mask grows with them: for short runs it stays smaller than the keys that would be copied, and where scores are
    written out it is small beside those.
    """
    if not is_regular(heads):
        return False
    return scores.softcap is not None or length * (heads.q_heads // heads.kv_heads) <= heads.head_dim


def _attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scores: Scores) -> Tensor:
    """q: [.., q_heads, m, d]; keys, values: [.., kv_heads, L, d]; mask, true where a key is seen: broadcasts to
    [.., heads, m, L]. Without one the queries are those of the keys, each sees itself and the keys before it, and the
    query heads may be a multiple of the KV heads; a softcap needs a mask."""
    if scores.softcap is None or mask is None:
        return F.scaled_dot_product_attention(
            q,
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scores.scale,
            enable_gqa=mask is None and q.shape[-3] != keys.shape[-3],
        )
    products = (q.float() * (scores.scale / scores.softcap)) @ keys.float().transpose(-1, -2)
    products.tanh_().mul_(scores.softcap).masked_fill_(~mask, -torch.inf)
    return (torch.softmax(products, dim=-1) @ values.float()).to(q.dtype)


def is_regular(heads: HeadLayout) -> bool:
    """Whether consecutive query heads share a KV head, equally many each, in order."""
    group, rest = divmod(heads.q_heads, heads.kv_heads) if heads.kv_heads else (0, 1)
    return rest == 0 and all(kv == i // group for i, kv in enumerate(heads.q_to_kv))
