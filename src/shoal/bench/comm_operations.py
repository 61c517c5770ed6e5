"""Measuring each operation of the communicators over sizes and backends. Ranks are processes of this host.

Sizes and bandwidths are those of nccl-tests (github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md), so that figures can be
compared. The size is that of the largest tensor of a rank: what it reduces, scatters, sends or broadcasts, and what it
has gathered. The algorithm bandwidth is this size divided by the time. The bus bandwidth is that times the share of the
bytes that each rank must send at least: it can be compared with the speed of the hardware, for any number of ranks.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from shoal.bench.rank_processes import measure_on_ranks
from shoal.errors import ConfigError

_NO_SIZE = ("barrier",)
_SMALLEST = 8  # bytes: at least one number of any type

# The factor from the algorithm bandwidth to the bus bandwidth, for n ranks.
_BUS_FACTORS: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_to_all": lambda n: (n - 1) / n,
    "broadcast": lambda n: 1.0,
    "send_recv": lambda n: 1.0,
    "barrier": lambda n: 0.0,
}
OPERATIONS = tuple(_BUS_FACTORS)
BACKENDS = ("shm", "gloo")


@dataclass(frozen=True, slots=True)
class OperationSizes:
    """The plan of a measurement: each operation with each number of bytes over each backend, `repeat` times.

    Raises:
        ConfigError: a size is too small.
    """

    ranks: int
    operations: tuple[str, ...]
    sizes: tuple[int, ...]
    backends: tuple[str, ...]
    dtype: str
    repeat: int

    def __post_init__(self) -> None:
        if min(self.sizes) < _SMALLEST:
            raise ConfigError(f"--size {min(self.sizes)} is too small: give at least {_SMALLEST} bytes")


def measure_operations(sizes: OperationSizes) -> list[dict[str, Any]]:
    """Measure the operations, whose results are checked.

    Each result has `operation`, `backend`, `bytes` (0 without a tensor), `us` (microseconds of the slowest rank, the
    median over runs), and the bandwidths `algorithm_bytes_per_s` and `bus_bytes_per_s`.

    Raises:
        RankFailed, EngineError: as `measure_on_ranks`; also if an operation gives a wrong result.
    """
    question = {**asdict(sizes), "without_size": _NO_SIZE}
    return _summary(measure_on_ranks("operations", sizes.ranks, question), sizes.ranks)


def _summary(answers: Sequence[Mapping[str, Any]], ranks: int) -> list[dict[str, Any]]:
    runs: dict[tuple[str, int, str], list[Sequence[float]]] = defaultdict(list)
    for answer in answers:
        runs[answer["operation"], answer["bytes"], answer["backend"]].append(answer["seconds"])
    return [_result(*key, of_ranks, ranks) for key, of_ranks in runs.items()]


def _result(
    operation: str, num_bytes: int, backend: str, of_ranks: Sequence[Sequence[float]], ranks: int
) -> dict[str, Any]:
    """Return one result from the seconds of each run on each rank."""
    seconds = statistics.median(max(run) for run in zip(*of_ranks, strict=True))
    return {
        "operation": operation,
        "bytes": num_bytes,
        "backend": backend,
        "us": 1e6 * seconds,
        "algorithm_bytes_per_s": num_bytes / seconds,
        "bus_bytes_per_s": num_bytes / seconds * _BUS_FACTORS[operation](ranks),
    }
