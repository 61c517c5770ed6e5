"""Measure the native and the reference kernels at the shapes of Qwen3-0.6B in bfloat16. Prints JSON.

The operations that other families use instead are measured at the same shapes.

    python benchmarks/kernels.py [--threads N] [--seconds S] [--only-cache-types [--processor-time]]

Times are medians in microseconds. The caches of several layers are used in turn, as in a model, so that data comes from
memory and not from the processor's cache. Native and reference kernels are measured in turn, so that other load on the
machine affects both.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from shoal.kernels.base import AttentionParams, HeadLayout, Kernels, KVCache, Norm, PagedBatch, QKNorm, Rope
from shoal.kernels.kv_rows import KV_DTYPES, SCALE_DTYPE, store_rows
from shoal.kernels.native import load_native
from shoal.kernels.reference import ReferenceKernels
from shoal.models.kv_format import KV_FORMATS

HEADS = HeadLayout(q_heads=16, kv_heads=8, head_dim=128, q_to_kv=tuple(i // 2 for i in range(16)))
HIDDEN, INTERMEDIATE, BLOCK_SIZE, DTYPE = 1024, 3072, 16, torch.bfloat16
CACHE_BYTES = 256 << 20  # of all layers together; much larger than any cache
QKV_SIZE = (HEADS.q_heads + 2 * HEADS.kv_heads) * HEADS.head_dim
MAX_LAYERS = 28
MIN_CALLS = 5
PROMPTS = (128, 2048, 6144)  # tokens, computed in one step each
CACHE_TYPES = ("bfloat16", "int8", "fp8_e4m3", "fp8_e5m2")

T = TypeVar("T")
Call = Callable[[Kernels, int], object]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Decodes:
    batch: PagedBatch
    layers: list[KVCache]
    bytes_per_layer: int


def make_cache(slots: int, kv: str = "bfloat16") -> KVCache:
    """Make a cache of the type `kv` with random keys and values."""
    shape, places = (slots, HEADS.kv_heads, HEADS.head_dim), torch.arange(slots)
    parts = [torch.empty(shape, dtype=KV_DTYPES[kv]) for _ in range(2)]
    scales = [torch.empty(shape[:2], dtype=SCALE_DTYPE) if KV_FORMATS[kv].scale_bytes else None for _ in range(2)]
    for part, own in zip(parts, scales, strict=True):
        store_rows(torch.randn(shape, dtype=DTYPE), places, part, own)
    return KVCache(*parts, *scales)


def decodes(count: int, context: int, kv: str = "bfloat16") -> Decodes:
    """Make `count` sequences with one query each. Their blocks are scattered over the cache."""
    blocks = -(-context // BLOCK_SIZE)
    tables = torch.randperm(count * blocks, dtype=torch.int32).view(count, blocks)
    last = context - 1
    batch = PagedBatch(
        positions=torch.full((count,), last),
        slots=tables[:, last // BLOCK_SIZE].long() * BLOCK_SIZE + last % BLOCK_SIZE,
        query_starts=torch.arange(count + 1, dtype=torch.int32),
        context_lens=torch.full((count,), context, dtype=torch.int32),
        block_tables=tables,
        block_size=BLOCK_SIZE,
        num_single=count,
        query_lens=(1,) * count,
        host_context_lens=(context,) * count,
    )
    size = 2 * count * context * HEADS.kv_heads * KV_FORMATS[kv].row_bytes(HEADS.head_dim)
    layers = max(2, min(MAX_LAYERS, CACHE_BYTES // size))
    return Decodes(batch, [make_cache(count * blocks * BLOCK_SIZE, kv) for _ in range(layers)], size)


def prompt(length: int, kv: str = "bfloat16") -> tuple[PagedBatch, KVCache]:
    """Make one sequence whose tokens are all queries. Its blocks are scattered over the cache."""
    blocks = -(-length // BLOCK_SIZE)
    tables = torch.randperm(blocks, dtype=torch.int32).unsqueeze(0)
    positions = torch.arange(length)
    batch = PagedBatch(
        positions=positions,
        slots=tables[0, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE,
        query_starts=torch.tensor([0, length], dtype=torch.int32),
        context_lens=torch.tensor([length], dtype=torch.int32),
        block_tables=tables,
        block_size=BLOCK_SIZE,
        num_single=0,
        query_lens=(length,),
        host_context_lens=(length,),
    )
    return batch, make_cache(blocks * BLOCK_SIZE, kv)


def measure_prompt(length: int, kernels: dict[str, Kernels], seconds: float) -> dict[str, object]:
    batch, cache = prompt(length)
    q = torch.randn(length, HEADS.q_heads, HEADS.head_dim, dtype=DTYPE)
    params = AttentionParams(HEADS.head_dim**-0.5)
    us = medians(lambda each, _: each.attend(q, HEADS, params, batch, cache), kernels, seconds)
    operations = 4 * HEADS.q_heads * HEADS.head_dim * length * (length + 1) / 2  # two products, of the visible keys
    gflops = {name: round(operations / taken / 1e3, 1) for name, taken in us.items()}
    return {"op": "attend a prompt", "tokens": length, "us": us, "GFLOP/s": gflops}


def measure_cache_types(kernels: Kernels, rows: int, context: int, seconds: float, clock: Clock) -> dict[str, object]:
    """Measure attention over KV caches of several types, in turn.

    `rows` sequences decode behind `context` tokens; with a context of 0 a prompt of `rows` tokens is computed.
    """
    params = AttentionParams(HEADS.head_dim**-0.5)
    q = torch.randn(rows, HEADS.q_heads, HEADS.head_dim, dtype=DTYPE)
    calls: dict[str, Callable[[int], object]] = {}
    for kv in CACHE_TYPES:
        if context:
            case = decodes(rows, context, kv)
            batch, layers = case.batch, case.layers
        else:
            batch, cache = prompt(rows, kv)
            layers = [cache]

        def attend(i: int, batch: PagedBatch = batch, layers: list[KVCache] = layers) -> Tensor:
            return kernels.attend(q, HEADS, params, batch, layers[i % len(layers)])

        calls[kv] = attend
    us = medians(lambda call, i: call(i), calls, seconds, clock)
    faster = {kv: round(us[CACHE_TYPES[0]] / taken, 2) for kv, taken in us.items()}
    return {"op": "attend, by type of the KV cache", "rows": rows, "context": context, "us": us, "faster": faster}


def medians(
    call: Callable[[T, int], object], kernels: Mapping[str, T], seconds: float, clock: Clock = time.perf_counter
) -> dict[str, float]:
    """Return the median microseconds of call(kernels, i) for i = 0, 1, ... with each of the kernels."""
    times: dict[str, list[float]] = {name: [] for name in kernels}
    for each in kernels.values():
        call(each, 0)
    end = time.perf_counter() + seconds
    i = 0
    while time.perf_counter() < end or i < MIN_CALLS:
        for name, each in kernels.items():
            start = clock()
            call(each, i)
            times[name].append(clock() - start)
        i += 1
    return {name: round(statistics.median(taken) * 1e6, 1) for name, taken in times.items()}


def small_operations(rows: int, case: Decodes) -> dict[str, Call]:
    x, residual = torch.randn(rows, HIDDEN, dtype=DTYPE), torch.randn(rows, HIDDEN, dtype=DTYPE)
    rms = Norm("rms", torch.ones(HIDDEN, dtype=DTYPE), None, 1e-6)
    others = {
        "rms_wide": Norm("rms_wide", torch.ones(HIDDEN), None, 1e-6),
        "layer": Norm("layer", torch.ones(HIDDEN, dtype=DTYPE), torch.zeros(HIDDEN, dtype=DTYPE), 1e-5),
    }
    head_norm = Norm("rms", torch.ones(HEADS.head_dim, dtype=DTYPE), None, 1e-6)
    gate_up, qkv = torch.randn(rows, 2 * INTERMEDIATE, dtype=DTYPE), torch.randn(rows, QKV_SIZE, dtype=DTYPE)
    qk_norm = QKNorm(head_norm, head_norm)
    angles = torch.rand(4096, HEADS.head_dim // 2)
    rope = Rope(angles.cos(), angles.sin())

    def layer(i: int) -> KVCache:
        return case.layers[i % len(case.layers)]

    return {
        "norm rms": lambda kernels, _: kernels.norm(x, rms),
        "add_norm rms": lambda kernels, _: kernels.add_norm(x, residual, rms),
        "add_norm rms_wide": lambda kernels, _: kernels.add_norm(x, residual, others["rms_wide"]),
        "add_norm layer": lambda kernels, _: kernels.add_norm(x, residual, others["layer"]),
        "activate_gated silu": lambda kernels, _: kernels.activate_gated(gate_up, "silu"),
        "activate_gated gelu": lambda kernels, _: kernels.activate_gated(gate_up, "gelu"),
        "activate_gated gelu_tanh": lambda kernels, _: kernels.activate_gated(gate_up, "gelu_tanh"),
        "rotate_and_store": lambda kernels, i: kernels.rotate_and_store(
            qkv, HEADS, qk_norm, rope, case.batch, layer(i)
        ),
    }


def read_cache(caches: KVCache) -> Tensor:
    """Return a call that reads a layer's cache from end to end, at the speed of memory."""
    return caches.keys.view(torch.int32).sum(dtype=torch.int32) + caches.values.view(torch.int32).sum(dtype=torch.int32)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the kernels, native against reference.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="for each operation and shape")
    parser.add_argument("--only-cache-types", action="store_true", help="only attention by type of the KV cache")
    parser.add_argument("--processor-time", action="store_true", help="of all threads, for the types of the KV cache")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    native, reason = load_native()
    kernels: dict[str, Kernels] = {"reference": ReferenceKernels()}
    if native is not None:
        kernels = {"native": native, **kernels}
    results: list[dict[str, object]] = []
    if native is not None:
        for rows, context in ((8, 2048), (8, 4096), (2048, 0)):
            clock = time.process_time if options.processor_time else time.perf_counter
            results.append(measure_cache_types(native, rows, context, options.seconds, clock))
    for rows in () if options.only_cache_types else (1, 8, 32):
        case = decodes(rows, 160)
        for name, call in small_operations(rows, case).items():
            results.append({"op": name, "rows": rows, "us": medians(call, kernels, options.seconds)})
        for context, window, softcap in ((160, None, None), (2048, None, None), (2048, None, 50.0), (2048, 512, None)):
            params = AttentionParams(HEADS.head_dim**-0.5, window, softcap)
            case = decodes(rows, context)
            q = torch.randn(rows, HEADS.q_heads, HEADS.head_dim, dtype=DTYPE)

            def attend(
                each: Kernels, i: int, case: Decodes = case, q: Tensor = q, params: AttentionParams = params
            ) -> Tensor:
                return each.attend(q, HEADS, params, case.batch, case.layers[i % len(case.layers)])

            def read(_: Kernels, i: int, case: Decodes = case) -> Tensor:
                return read_cache(case.layers[i % len(case.layers)])

            us = medians(attend, kernels, options.seconds)
            us["linear_read"] = medians(read, {"linear_read": kernels["reference"]}, options.seconds)["linear_read"]
            results.append(
                {"op": "attend", "rows": rows, "context": context, "window": window, "softcap": softcap, "us": us}
            )
            if window is None:
                results[-1]["GB/s"] = {name: round(case.bytes_per_layer / taken / 1e3, 1) for name, taken in us.items()}
    if not options.only_cache_types:
        results += [measure_prompt(length, kernels, options.seconds) for length in PROMPTS]
    print(json.dumps({"threads": options.threads, "native": reason, "results": results}, indent=2))


if __name__ == "__main__":
    main()
