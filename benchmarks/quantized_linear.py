"""Measure quantized linear layers at the shapes of a layer of Qwen3-0.6B, beside plain ones and oneDNN's int8.

    python benchmarks/quantized_linear.py [--threads N] [--seconds S] [--rows N ...] [--only NAME ...]

Prints JSON. Times are medians in microseconds for the four linear layers of a decoder layer, one after the other; with
one thread they are those of the processor. Several layers are used in turn, as in a model, so that weights come from
memory and not from the processor's cache. Implementations are measured in turn, so that other load on the machine
affects all of them.

oneDNN's operation (`qlinear_pointwise`) has one scale for all rows. To have a scale for each row, as ours, it is given
the codes of quantized rows and returns float32; PyTorch quantizes the rows before it and multiplies by their scales
after it. `_int_mm` is PyTorch's product of int8 matrices, with the same before and after it.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from shoal.kernels.int4_linear import NativeInt4Linear
from shoal.kernels.int8_linear import NativeInt8Linear, TorchInt8Linear
from shoal.kernels.linear import make_linear
from shoal.kernels.linear_weights import LinearWeights, quantize_int8, quantize_rows
from shoal.kernels.quantized import quantize_weight
from shoal.kernels.quantized_library import load_quantized
from shoal.kernels.weight_format import INT4

SHAPES = {"qkv": (4096, 1024), "out": (1024, 2048), "gate_up": (6144, 1024), "down": (1024, 3072)}
LAYERS = 8  # more than the processor's cache holds
ROWS = (1, 8, 32, 128, 512, 2048)
MIN_CALLS = 5

Linear = Callable[[Tensor], Tensor]


class OneDnnInt8Linear:
    """oneDNN's int8 linear layer, with scales for rows and for outputs."""

    def __init__(self, weight: LinearWeights) -> None:
        self._scales = weight.scales.flatten()
        self._zeros = torch.zeros(len(self._scales), dtype=torch.int64)
        self._packed = torch.ops.onednn.qlinear_prepack(weight.codes, None)

    def __call__(self, x: Tensor) -> Tensor:
        codes, scales = quantize_rows(x)
        codes = codes.view(torch.uint8).add_(128)  # wraps around: from int8 to unsigned codes with the zero point 128
        product: Tensor = torch.ops.onednn.qlinear_pointwise(
            *(codes, 1.0, 128, self._packed, self._scales, self._zeros),
            *(None, 1.0, 0, torch.float32, "none", [], ""),
        )
        return product.mul_(scales).to(x.dtype)


def float32_linear(weight: Tensor) -> Linear:
    linear = make_linear(weight.float(), None)
    return lambda x: linear(x.float())


def implementations() -> dict[str, Callable[[Tensor], Linear]]:
    """Return for each implementation how to make a layer from a bfloat16 weight."""
    library, _ = load_quantized()
    found: dict[str, Callable[[Tensor], Linear]] = {
        "bf16": lambda weight: make_linear(weight, None),
        "float32": float32_linear,
    }
    if library is not None:
        for level in library.levels:
            found[f"int8 {level}"] = lambda weight, level=level: NativeInt8Linear(  # type: ignore[misc]
                quantize_int8(weight), None, library, level
            )
            for group, kept_in in INT4.items():
                found[f"int4 {group} {level}"] = lambda weight, level=level, kept_in=kept_in: NativeInt4Linear(  # type: ignore[misc]
                    quantize_weight(weight, kept_in), None, library, level
                )
    found["int8 oneDNN"] = lambda weight: OneDnnInt8Linear(quantize_int8(weight))
    found["int8 _int_mm"] = lambda weight: TorchInt8Linear(quantize_int8(weight), None)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Times linear layers with quantized weights.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=2.0, help="for each number of rows")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--only", nargs="+", default=[""], help="how the names of implementations begin")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    weights = [[torch.randn(shape).bfloat16() for shape in SHAPES.values()] for _ in range(LAYERS)]
    makers = {name: make for name, make in implementations().items() if name.startswith(tuple(options.only))}
    made = {name: [[make(weight) for weight in layer] for layer in weights] for name, make in makers.items()}
    numbers = sum(outputs * inputs for outputs, inputs in SHAPES.values())
    results = []
    for rows in options.rows:
        inputs = [torch.randn(rows, shape[1]).bfloat16() for shape in SHAPES.values()]
        times: dict[str, list[float]] = {name: [] for name in made}
        end, i = time.perf_counter() + options.seconds, -1
        while time.perf_counter() < end or i < MIN_CALLS:
            for name, layers in made.items():
                start = clock()
                for linear, x in zip(layers[i % LAYERS], inputs, strict=True):
                    linear(x)
                if i >= 0:  # the first turn warms up
                    times[name].append(clock() - start)
            i += 1
        us = {name: statistics.median(taken) * 1e6 for name, taken in times.items()}
        results.append(
            {
                "rows": rows,
                "us": {name: round(taken) for name, taken in us.items()},
                "GOP/s": {name: round(2 * numbers * rows / taken / 1e3) for name, taken in us.items()},
            }
        )
    print(json.dumps({"threads": options.threads, "numbers": numbers, "results": results}, indent=2))


if __name__ == "__main__":
    main()
