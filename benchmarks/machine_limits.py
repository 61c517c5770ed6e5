"""Measure the limits of this machine, to compare other figures with: `python benchmarks/machine_limits.py` prints JSON.

Bind the threads as the engine does: GOMP_CPU_AFFINITY="0 1" OMP_NUM_THREADS=2 python benchmarks/machine_limits.py
"""

import json
import statistics
import time
from collections.abc import Callable

import torch

from shoal.kernels.linear import make_linear

_REPEAT = 9
_OUT_FEATURES, _IN_FEATURES = 6144, 1024
_WEIGHTS = 24  # linear layers that are used in turn; together they are larger than any cache


def _seconds(work: Callable[[], object]) -> float:
    """Return the median time of several calls, after a first call that does not count."""
    times = []
    for _ in range(_REPEAT + 1):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def _matmul_gflops(threads: int) -> float:
    torch.set_num_threads(threads)
    a, b = (torch.randn(2048, 2048).bfloat16() for _ in range(2))
    return 2 * 2048**3 / _seconds(lambda: a @ b) / 1e9


def _read_gb_per_s() -> float:
    data = torch.randn(64 * 2**20)
    return data.nbytes / _seconds(data.sum) / 1e9


def _linear(rows: int) -> dict[str, float]:
    layers = [make_linear(torch.randn(_OUT_FEATURES, _IN_FEATURES).bfloat16(), None) for _ in range(_WEIGHTS)]
    x = torch.randn(rows, _IN_FEATURES).bfloat16()
    seconds = _seconds(lambda: [layer(x) for layer in layers]) / _WEIGHTS
    size = _OUT_FEATURES * _IN_FEATURES
    return {
        "rows": rows,
        "us": seconds * 1e6,
        "gb_per_s": 2 * size / seconds / 1e9,
        "gflops": 2 * rows * size / seconds / 1e9,
    }


def main() -> None:
    threads = torch.get_num_threads()
    report = {
        "threads": threads,
        "bf16_matmul_gflops": {count: _matmul_gflops(count) for count in sorted({1, threads})},
        "read_gb_per_s": _read_gb_per_s(),
        f"packed_linear_{_OUT_FEATURES}x{_IN_FEATURES}": [_linear(rows) for rows in (1, 8, 32, 256)],
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
