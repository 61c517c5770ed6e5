"""Random paged batches, and the attention over them by its formula."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shoal.kernels.base import AttentionParams, HeadLayout, KVCache, PagedBatch
from shoal.kernels.kv_rows import KV_DTYPES, SCALE_DTYPE, read_rows, store_rows


@dataclass(frozen=True)
class Case:
    q: Tensor
    heads: HeadLayout
    params: AttentionParams
    batch: PagedBatch
    cache: KVCache


def make_batch(lens: Sequence[tuple[int, int]], block_size: int, generator: torch.Generator) -> tuple[PagedBatch, int]:
    """Return a batch and its number of slots. lens: (queries, context) of each sequence, single queries first."""
    counts = [-(-context // block_size) for _, context in lens]
    shuffled = torch.randperm(sum(counts) + 1, generator=generator, dtype=torch.int32)
    tables = torch.zeros(len(lens), max(counts, default=0), dtype=torch.int32)
    for i, blocks in enumerate(shuffled[: sum(counts)].split(counts)):
        tables[i, : len(blocks)] = blocks
    query_lens = tuple(queries for queries, _ in lens)
    positions = torch.cat([torch.arange(context - queries, context) for queries, context in lens])
    rows = torch.repeat_interleave(torch.arange(len(lens)), torch.tensor(query_lens))
    slots = tables[rows, positions // block_size].long() * block_size + positions % block_size
    batch = PagedBatch(
        positions=positions,
        slots=slots,
        query_starts=torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32),
        context_lens=torch.tensor([context for _, context in lens], dtype=torch.int32),
        block_tables=tables,
        block_size=block_size,
        num_single=sum(queries == 1 for queries in query_lens),
        query_lens=query_lens,
        host_context_lens=tuple(context for _, context in lens),
    )
    return batch, len(shuffled) * block_size


def make_cache(slots: int, kv_heads: int, head_dim: int, kv: str) -> KVCache:
    """Return a cache of the type `kv` whose slots contain NaN, which shows if a kernel reads them."""
    shape = (slots, kv_heads, head_dim)
    if kv == "int8":
        keys, values = torch.zeros((2, *shape), dtype=torch.int8)
        return KVCache(keys, values, *torch.full((2, *shape[:2]), torch.nan, dtype=SCALE_DTYPE))
    return KVCache(*torch.full((2, *shape), torch.nan).to(KV_DTYPES[kv]))


def make_case(
    lens: Sequence[tuple[int, int]],
    q_to_kv: tuple[int, ...],
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    block_size: int = 16,
    seed: int = 0,
    window: int | None = None,
    softcap: float | None = None,
    kv: str = "",
) -> Case:
    """Make sequences with random queries, keys and values. kv: the type of the cache; "": that of the queries."""
    generator = torch.Generator().manual_seed(seed)
    batch, slots = make_batch(lens, block_size, generator)
    heads = HeadLayout(len(q_to_kv), kv_heads, head_dim, q_to_kv)
    cache = make_cache(slots, kv_heads, head_dim, kv or str(dtype).removeprefix("torch."))
    for table, context in zip(batch.block_tables, batch.host_context_lens, strict=True):
        where = torch.arange(context)
        owned = table[where // block_size].long() * block_size + where % block_size
        for part, scales in ((cache.keys, cache.key_scales), (cache.values, cache.value_scales)):
            rows = torch.randn(context, kv_heads, head_dim, generator=generator).to(dtype)
            store_rows(rows, owned, part, scales)
    q = torch.randn(len(batch.positions), len(q_to_kv), head_dim, generator=generator).to(dtype)
    return Case(q, heads, AttentionParams(head_dim**-0.5, window, softcap), batch, cache)


def rows_of_sequence(case: Case, i: int) -> slice:
    start = sum(case.batch.query_lens[:i])
    return slice(start, start + case.batch.query_lens[i])


def alone(case: Case, i: int) -> Case:
    """Return a batch of sequence i alone."""
    rows, batch = rows_of_sequence(case, i), case.batch
    queries = batch.query_lens[i]
    single = PagedBatch(
        positions=batch.positions[rows],
        slots=batch.slots[rows],
        query_starts=torch.tensor([0, queries], dtype=torch.int32),
        context_lens=batch.context_lens[i : i + 1],
        block_tables=batch.block_tables[i : i + 1],
        block_size=batch.block_size,
        num_single=int(queries == 1),
        query_lens=(queries,),
        host_context_lens=(batch.host_context_lens[i],),
    )
    return replace(case, q=case.q[rows], batch=single)


def chunk(case: Case, first: int, end: int) -> Case:
    """Return a step that computes the queries [first, end) of a case with one sequence.

    The slots of later queries contain NaN.
    """
    batch, queries = case.batch, end - first
    context = batch.host_context_lens[0] - (batch.query_lens[0] - end)
    cache = copy_of(case.cache)
    forget(cache, batch.slots[end:])
    step = replace(
        batch,
        positions=batch.positions[first:end],
        slots=batch.slots[first:end],
        query_starts=torch.tensor([0, queries], dtype=torch.int32),
        context_lens=torch.tensor([context], dtype=torch.int32),
        num_single=int(queries == 1),
        query_lens=(queries,),
        host_context_lens=(context,),
    )
    return replace(case, q=case.q[first:end], batch=step, cache=cache)


def copy_of(cache: KVCache) -> KVCache:
    scales = (None if each is None else each.clone() for each in (cache.key_scales, cache.value_scales))
    return KVCache(cache.keys.clone(), cache.values.clone(), *scales)


def forget(cache: KVCache, slots: Tensor) -> None:
    """Fill slots with NaN."""
    nothing = torch.full((len(slots), *cache.keys.shape[1:]), torch.nan)
    store_rows(nothing, slots, cache.keys, cache.key_scales)
    store_rows(nothing, slots, cache.values, cache.value_scales)


def formula(case: Case) -> tuple[Tensor, Tensor]:
    """Return softmax(s) v in float64, where s is q k^T * scale with softcap and window, and the scale of its errors.

    Keys and values are read as they are stored. The scale of the errors is softmax(s) |v|. Both are
    [n, q_heads * head_dim].
    """
    batch = case.batch
    out, size = torch.zeros(2, *case.q.shape, dtype=torch.float64)
    kv_of = list(case.heads.q_to_kv)
    for i, context in enumerate(batch.host_context_lens):
        where = torch.arange(context)
        owned = batch.block_tables[i][where // batch.block_size].long() * batch.block_size + where % batch.block_size
        cache = case.cache
        keys = read_rows(cache.keys, cache.key_scales, owned, torch.float32).double()[:, kv_of]
        values = read_rows(cache.values, cache.value_scales, owned, torch.float32).double()[:, kv_of]
        rows = rows_of_sequence(case, i)
        positions = torch.arange(context - batch.query_lens[i], context)[:, None, None]
        seen = where <= positions
        if case.params.window is not None:
            seen &= where > positions - case.params.window
        scores = torch.einsum("rhd,lhd->rhl", case.q[rows].double(), keys) * case.params.scale
        if case.params.softcap is not None:
            scores = case.params.softcap * torch.tanh(scores / case.params.softcap)
        weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1)
        out[rows] = torch.einsum("rhl,lhd->rhd", weights, values)
        size[rows] = torch.einsum("rhl,lhd->rhd", weights, values.abs())
    return out.flatten(1), size.flatten(1)
