"""A rank's place in a pipeline: what comes from the stage before, what goes on to the next one, and the way back.

What is sent is waited for some steps later only, so a stage computes the next batch while its last one travels or
waits to be taken. A pipeline of one stage is first and last, and nothing of this happens.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from shoal.comm.base import Sending
from shoal.parallel.mesh import Axis
from shoal.parallel.stages import STREAMS_ON_WAY


class Pipeline:
    """Every stage's ranks call `receive` and `send` once a step, and the outer two `send_tokens` and `receive_tokens`
    once for each step that draws tokens, in the order of the steps."""

    def __init__(
        self, pp: Axis, back: Axis, *, width: int, dtype: torch.dtype, device: torch.device, depth: int
    ) -> None:
        """back: from the last stage, its rank 1, to the first, its rank 0. width: of the residual stream. depth: plans
        that are out at a time, at most; what was drawn so many steps ago has been read."""
        self.depth = depth
        self.first = pp.rank == 0
        self.last = pp.rank == pp.size - 1
        self.waited_ns = 0  # for other stages' tensors; on a GPU that wait is behind the call, and not counted
        self._pp = pp
        self._back = back
        self._shape = (width,)
        self._dtype = dtype
        self._device = device
        self._on_way: deque[Sending] = deque()
        self._tokens_on_way: deque[Sending] = deque()

    def bytes_on_way(self, tokens: int) -> int:
        """What is kept, at most, of steps of so many tokens until the next stage has them."""
        return 0 if self.last else STREAMS_ON_WAY * tokens * self._shape[0] * self._dtype.itemsize

    def receive(self, tokens: int) -> Tensor:
        """The residual stream [tokens, width] as the stage before left it."""
        with self._waiting():
            stream = torch.empty((tokens, *self._shape), dtype=self._dtype, device=self._device)
            return self._pp.comm.recv(stream, self._pp.rank - 1)

    def send(self, stream: Tensor) -> None:
        """To the next stage. The tensor is not to be written to any more. A step further ahead than `STREAMS_ON_WAY`
        waits."""
        self._keep(self._on_way, STREAMS_ON_WAY, self._pp.comm.send(stream, self._pp.rank + 1))

    def send_tokens(self, tokens: Tensor) -> None:
        """tokens: int64 [n] on the host; from the last stage to the first."""
        self._keep(self._tokens_on_way, self.depth, self._back.comm.send(tokens, 0))

    def receive_tokens(self, count: int) -> Tensor:
        """int64 [count] on the host."""
        with self._waiting():
            return self._back.comm.recv(torch.empty(count, dtype=torch.int64), 1)

    def _keep(self, on_way: deque[Sending], most: int, sending: Sending) -> None:
        """A sending that nobody keeps is given up."""
        on_way.append(sending)
        if len(on_way) > most:
            with self._waiting():
                on_way.popleft().wait()

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        begun = time.perf_counter_ns()
        yield
        self.waited_ns += time.perf_counter_ns() - begun
