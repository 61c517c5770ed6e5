"""Measure bfloat16 linear layers at the shapes of Qwen3-0.6B: ours and oneDNN's. Prints JSON.

Where oneDNN has no bfloat16, on CPUs without AVX-512, ours are compared with PyTorch's and with oneDNN's in float32.

    python benchmarks/linear.py [--threads N ...] [--rows N ...] [--levels L ...] [--seconds S] [--head]

Times are in microseconds for the four linear layers of a decoder layer, one after the other, or with --head for the
output head: the median, and the shortest tenth, which other load on the machine affects least. With one thread they are
those of the processor, so that time of other programs does not count. Several layers are used in turn, as in a model,
so that weights come from memory and not from the processor's cache. Implementations are measured in turn, so that other
load affects all of them.

ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 keeps oneDNN from AMX, to compare it with our code for AVX-512 BF16.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from shoal.kernels.bf16_linear import NativeBf16Linear, load_bf16
from shoal.kernels.linear import Linear, PackedLinear, PlainLinear

LAYER = {"qkv": (4096, 1024), "out": (1024, 2048), "gate_up": (6144, 1024), "down": (1024, 3072)}
HEAD = {"head": (151936, 1024)}
LAYERS = 8  # more than the processor's cache holds
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
MIN_CALLS = 5

MakeLinear = Callable[[Tensor], Linear]


def implementations(levels: list[str] | None) -> dict[str, MakeLinear]:
    """Return for each implementation how to make a layer from a weight; levels: of ours, None for all."""
    library, why = load_bf16()
    if library is None:
        raise SystemExit(f"no native implementation: {why}")
    found: dict[str, MakeLinear] = {"oneDNN": lambda weight: PackedLinear(weight, None)}
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        found = {"PyTorch": lambda weight: PlainLinear(weight, None), "oneDNN, float32": in_float32}
    for level in levels or library.levels:
        found[level] = lambda weight, level=level: NativeBf16Linear(weight, None, library, level)  # type: ignore[misc]
    return found


def in_float32(weight: Tensor) -> Linear:
    packed = PackedLinear(weight.float(), None)
    return lambda x: packed(x.float())


def measure(layers: dict[str, list[list[Linear]]], inputs: list[Tensor], seconds: float) -> dict[str, list[float]]:
    """Return the seconds of each call of all linear layers of one decoder layer."""
    times: dict[str, list[float]] = {name: [] for name in layers}
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    end, i = time.perf_counter() + seconds, -1
    while time.perf_counter() < end or i < MIN_CALLS:
        for name, of_name in layers.items():
            start = clock()
            for linear, x in zip(of_name[i % len(of_name)], inputs, strict=True):
                linear(x)
            if i >= 0:  # the first turn warms up
                times[name].append(clock() - start)
        i += 1
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description="Times linear layers with bfloat16 weights.")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each number of threads and rows")
    parser.add_argument(
        "--levels", nargs="+", help="instructions that our code uses, such as avx512_bf16; default: all"
    )
    parser.add_argument("--head", action="store_true", help="measure the output head")
    options = parser.parse_args()
    shapes, count = (HEAD, 1) if options.head else (LAYER, LAYERS)
    weights = [[torch.randn(shape).bfloat16() for shape in shapes.values()] for _ in range(count)]
    makers = implementations(options.levels)
    made = {name: [[make(weight) for weight in layer] for layer in weights] for name, make in makers.items()}
    numbers = sum(outputs * inputs for outputs, inputs in shapes.values())
    results = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for rows in options.rows:
            inputs = [torch.randn(rows, shape[1]).bfloat16() for shape in shapes.values()]
            times = measure(made, inputs, options.seconds)
            low = {name: sorted(taken)[len(taken) // 10] for name, taken in times.items()}
            results.append(
                {
                    "threads": threads,
                    "rows": rows,
                    "median us": {name: round(statistics.median(taken) * 1e6) for name, taken in times.items()},
                    "shortest tenth us": {name: round(taken * 1e6) for name, taken in low.items()},
                    "GFLOP/s": {name: round(2 * numbers * rows / taken / 1e9) for name, taken in low.items()},
                    "GB/s": {name: round(2 * numbers / taken / 1e9, 1) for name, taken in low.items()},
                }
            )
    print(json.dumps({"numbers": numbers, "results": results}, indent=2))


if __name__ == "__main__":
    main()
