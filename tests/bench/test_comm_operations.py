"""Measuring the operations between ranks: right results, and the definitions of the figures."""

from collections.abc import Sequence
from typing import Any

import pytest
from torch import Tensor

from shoal.bench import comm_operations
from shoal.bench.comm_operations import OPERATIONS, OperationSizes, measure_operations
from shoal.comm.threads import ThreadComm, ThreadGroup
from shoal.errors import CommError, ConfigError
from shoal.worker.comm_operations import measure
from support.fakes import on_threads

SIZES = OperationSizes(3, OPERATIONS, (8, 1000), ("threads",), "bfloat16", 2)
QUESTION = {"operations": OPERATIONS, "sizes": [8, 1000], "backends": ["threads"], "dtype": "bfloat16", "repeat": 2}


def question(**changes: Any) -> dict[str, Any]:
    return {**QUESTION, "without_size": ["barrier"], **changes}


def test_ranks_measure_every_operation_and_find_it_right() -> None:
    group = ThreadGroup(3, 60)
    answers = on_threads(3, lambda rank: list(measure(lambda *_: ThreadComm(group, rank), rank, question())))
    cells = [(operation, size) for operation in OPERATIONS[:-1] for size in (8, 1000)] + [("barrier", 0)]
    for of_rank in answers:
        assert [(answer["operation"], answer["bytes"]) for answer in of_rank] == cells
        assert all(len(answer["seconds"]) == 2 and min(answer["seconds"]) > 0 for answer in of_rank)


def test_a_wrong_result_is_an_error() -> None:
    class Wrong(ThreadComm):
        def all_gather(self, x: Tensor, sizes: Sequence[int], dim: int = 0) -> Tensor:
            found = super().all_gather(x, sizes, dim)
            found[-1] += 1
            return found

    group = ThreadGroup(2, 60)

    def run(rank: int) -> None:
        with pytest.raises(CommError, match=f"rank {rank}: all_gather of 8 bytes over threads gives a wrong result"):
            list(measure(lambda *_: Wrong(group, rank), rank, question(operations=["all_gather"])))

    on_threads(2, run)


def test_the_figures_are_those_of_nccl_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each run the slowest rank counts. With three ranks a reduced byte crosses a link 4/3 times, a gathered 2/3."""

    def answer(name: str, asked_ranks: int, asked: Any) -> list[dict[str, Any]]:
        assert (name, asked_ranks, asked["without_size"]) == ("operations", 3, ("barrier",))
        cells = [(operation, 0 if operation == "barrier" else 1200) for operation in OPERATIONS]
        seconds = [[1e-6, 9e-6, 3e-6], [2e-6, 1e-6, 1e-6], [1e-6, 1e-6, 2e-6]]
        return [
            {"operation": operation, "bytes": size, "backend": "shm", "seconds": of_rank}
            for of_rank in seconds
            for operation, size in cells
        ]

    monkeypatch.setattr(comm_operations, "measure_on_ranks", answer)
    results = {result["operation"]: result for result in measure_operations(SIZES)}
    assert all(result["us"] == pytest.approx(3) for result in results.values())
    assert results["all_reduce"]["algorithm_bytes_per_s"] == pytest.approx(4e8)
    bus = {operation: result["bus_bytes_per_s"] / 4e8 for operation, result in results.items()}
    assert bus == pytest.approx(
        {
            "all_reduce": 4 / 3,
            "all_gather": 2 / 3,
            "reduce_scatter": 2 / 3,
            "all_to_all": 2 / 3,
            "broadcast": 1,
            "send_recv": 1,
            "barrier": 0,
        }
    )


def test_a_size_holds_a_number() -> None:
    with pytest.raises(ConfigError, match="--size 7 is too small: give at least 8 bytes"):
        OperationSizes(2, OPERATIONS, (1024, 7), ("shm",), "float32", 1)
