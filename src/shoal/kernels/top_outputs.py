"""The interface of linear layers that find the largest output of each row without writing all of them."""

from typing import Protocol, runtime_checkable

from torch import Tensor

TopOutputs = tuple[Tensor, Tensor]  # of each row: the largest output, float32 [n], and its id, int64 [n]


@runtime_checkable
class TopLinear(Protocol):
    """A linear layer that can give the top output of each row alone, as an output head does for greedy tokens."""

    def top(self, x: Tensor, start: int) -> TopOutputs | None:
        """Return the largest of the outputs that a call gives for each row, and its id; None: call the layer instead.

        The id of the first output is `start`. Of equal outputs, the first is taken.
        """
