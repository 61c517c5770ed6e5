"""Tests of sums that travel while the next part is computed."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from shoal.comm.base import FinishedSum
from shoal.comm.local import LocalComm
from shoal.parallel.mesh import Axis


class TravellingSum:
    """A sum that is there when someone waits for it."""

    def __init__(self, x: Tensor, told: Callable[[str], None]) -> None:
        self.x = x
        self.told = told

    def wait(self) -> Tensor:
        self.told(f"sum of {len(self.x)}")
        return 2 * self.x


class Comm(LocalComm):
    """Two ranks with the same tensors, between which sums travel."""

    def __init__(self, *, overlaps: bool) -> None:
        super().__init__()
        self.overlaps = overlaps
        self.told: list[str] = []

    def all_reduce(self, x: Tensor) -> Tensor:
        return 2 * x

    def begin_all_reduce(self, x: Tensor) -> FinishedSum:
        return TravellingSum(x, self.told.append)  # type: ignore[return-value]


def axis(comm: Comm) -> Axis:
    return Axis("tp", 0, 2, comm)


@pytest.mark.parametrize(("rows", "parts"), [(0, [0]), (255, [255]), (256, [128, 128]), (1001, [251, 250, 250, 250])])
def test_parts_are_computed_before_the_sum_of_the_first_is_awaited(rows: int, parts: list[int]) -> None:
    comm = Comm(overlaps=True)
    x = torch.randn(rows, 3)

    def compute(part: Tensor) -> Tensor:
        comm.told.append(f"computed {len(part)}")
        return part + 1

    assert torch.equal(axis(comm).sum_of(x, compute), 2 * (x + 1))
    sums = [f"sum of {count}" for count in parts] if len(parts) > 1 else []
    assert comm.told == [f"computed {count}" for count in parts] + sums


def test_nothing_is_cut_where_tensors_do_not_travel() -> None:
    comm = Comm(overlaps=False)
    counts: list[int] = []

    def compute(part: Tensor) -> Tensor:
        counts.append(len(part))
        return part

    assert torch.equal(axis(comm).sum_of(torch.ones(1000, 2), compute), torch.full((1000, 2), 2.0))
    assert torch.equal(Axis("tp", 0, 1, comm).sum_of(torch.ones(1000, 2), compute), torch.ones(1000, 2))
    assert counts == [1000, 1000]
