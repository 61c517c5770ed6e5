"""Measure a rank's grouped experts beside their matrix products alone, at the shape of Qwen3-30B-A3B. Prints JSON.

    python benchmarks/experts.py [--threads N] [--seconds S] [--tokens 1,4,16,64] [--dtype bfloat16]

There are 128 experts, 8 for each token, with hidden size 2048 and 768 columns each. The weights of several layers are
used in turn, so that they come from memory. Every token chooses its experts at random. Times are medians in
microseconds (with one thread of the processor's time): of the whole, of the linear layers alone (their rows are
prepared before), of these layers one by one, of the routing, and of the rest for each expert that had work. They are
measured in turn, so that other load on the machine affects all. `tiny` is the same with experts of 16 x 16, which
multiply almost nothing: it shows the cost of the calls.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from shoal.kernels.base import Kernels
from shoal.kernels.experts import GroupedExperts
from shoal.kernels.linear import Linear, make_linear
from shoal.kernels.select import make_kernels
from shoal.models.spec import RoutingSpec

EXPERTS, ROUTING = 128, RoutingSpec(8)
MIN_CALLS = 5


@dataclass(frozen=True)
class Layer:
    up: list[Linear]
    down: list[Linear]
    grouped: GroupedExperts


def make_layer(hidden: int, inner: int, dtype: torch.dtype, kernels: Kernels) -> Layer:
    up: list[Linear] = [make_linear(torch.randn(2 * inner, hidden, dtype=dtype) * 0.02, None) for _ in range(EXPERTS)]
    down: list[Linear] = [make_linear(torch.randn(hidden, inner, dtype=dtype) * 0.02, None) for _ in range(EXPERTS)]
    return Layer(up, down, GroupedExperts(up, partial(kernels.activate_gated, activation="silu"), down, kernels))


def medians(calls: dict[str, Callable[[int], object]], seconds: float) -> dict[str, float]:
    """Return the median microseconds of each call. The calls run in turn, with 0, 1, ... as argument."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for call in calls.values():
        call(0)
    end, i = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or i < MIN_CALLS:
        for name, call in calls.items():
            start = clock()
            call(i)
            times[name].append((clock() - start) * 1e6)
        i += 1
    return {name: round(statistics.median(found), 1) for name, found in times.items()}


def measure(layers: list[Layer], tokens: int, hidden: int, inner: int, dtype: torch.dtype, seconds: float) -> object:
    x, logits = torch.randn(tokens, hidden, dtype=dtype), torch.randn(tokens, EXPERTS)
    experts, weights = layers[0].grouped.kernels.route(logits, ROUTING, None)
    counts = torch.bincount(experts.flatten(), minlength=EXPERTS).tolist()
    busy = [(e, count) for e, count in enumerate(counts) if count]
    pairs = sum(counts)
    rows, inners = torch.randn(pairs, hidden, dtype=dtype), torch.randn(pairs, inner, dtype=dtype)

    def products(i: int) -> tuple[Tensor, Tensor]:
        grouped = layers[i % len(layers)].grouped
        return grouped.up(rows, counts), grouped.down(inners, counts)

    def one_by_one(i: int) -> list[Tensor]:
        layer = layers[i % len(layers)]
        of_up, of_down = rows.split(counts), inners.split(counts)
        return [layer.up[e](of_up[e]) for e, _ in busy] + [layer.down[e](of_down[e]) for e, _ in busy]

    found = medians(
        {
            "whole": lambda i: layers[i % len(layers)].grouped(x, experts, weights),
            "products": products,
            "one_by_one": one_by_one,
            "routing": lambda _: layers[0].grouped.kernels.route(logits, ROUTING, None),
        },
        seconds,
    )
    beside = round((found["whole"] - found["products"]) / len(busy), 2)
    return {"tokens": tokens, "busy_experts": len(busy), **found, "beside_products_per_expert": beside}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each number of tokens")
    parser.add_argument("--tokens", default="1,4,16,64")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--layers", type=int, default=2)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    dtype: torch.dtype = getattr(torch, options.dtype)
    kernels, reason = make_kernels("cpu", dtype)
    report: dict[str, object] = {"threads": options.threads, "dtype": options.dtype, "kernels": reason}
    with torch.inference_mode():
        for name, hidden, inner in (("experts", 2048, 768), ("tiny", 16, 16)):
            layers = [make_layer(hidden, inner, dtype, kernels) for _ in range(options.layers)]
            counts = [int(tokens) for tokens in options.tokens.split(",")]
            report[name] = [measure(layers, tokens, hidden, inner, dtype, options.seconds) for tokens in counts]
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
