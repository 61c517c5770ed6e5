"""Communication between pipeline stages: residual streams to the next stage, sampled tokens back to the first.

A stage waits for the end of a send only some steps later, so it computes the next batch while the last one is on its
way. A single stage is both first and last, and calls none of these functions.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from shoal.comm.base import PendingSend
from shoal.parallel.mesh import Axis
from shoal.parallel.stages import MAX_PENDING_SENDS


class Pipeline:
    """One rank's connections to the neighbouring stages.

    The ranks of a stage call `receive` and `send` once a step, except that the first stage does not receive and the
    last does not send. For each step that samples tokens, in step order, the last stage calls `send_tokens` and the
    first stage `receive_tokens`.
    """

    def __init__(
        self, pp: Axis, token_return: Axis, *, width: int, dtype: torch.dtype, device: torch.device, depth: int
    ) -> None:
        """token_return: rank 1 is the last stage, rank 0 the first. width: of the residual stream. depth: the most
        steps in flight; tokens that were sampled that many steps ago have been received."""
        self.depth = depth
        self.first = pp.rank == 0
        self.last = pp.rank == pp.size - 1
        self.waited_ns = 0  # time spent in waits for other stages; on a GPU the calls return early, and it stays near 0
        self._pp = pp
        self._token_return = token_return
        self._width = width
        self._dtype = dtype
        self._device = device
        self._pending_sends: deque[PendingSend] = deque()
        self._pending_token_sends: deque[PendingSend] = deque()

    def pending_send_bytes(self, tokens: int) -> int:
        """Return the most bytes that pending sends hold if each step has `tokens` tokens."""
        return 0 if self.last else MAX_PENDING_SENDS * tokens * self._width * self._dtype.itemsize

    def receive(self, tokens: int) -> Tensor:
        """Return the residual stream [tokens, width] that the previous stage has sent."""
        with self._timed_wait():
            stream = torch.empty((tokens, self._width), dtype=self._dtype, device=self._device)
            return self._pp.comm.recv(stream, self._pp.rank - 1)

    def send(self, stream: Tensor) -> None:
        """Send a residual stream to the next stage. It must not be changed afterwards.

        Waits while more than `MAX_PENDING_SENDS` sends are pending.
        """
        self._add_pending(self._pending_sends, MAX_PENDING_SENDS, self._pp.comm.send(stream, self._pp.rank + 1))

    def send_tokens(self, tokens: Tensor) -> None:
        """Send sampled tokens, int64 [n] on the host, from the last stage to the first."""
        self._add_pending(self._pending_token_sends, self.depth, self._token_return.comm.send(tokens, 0))

    def receive_tokens(self, count: int) -> Tensor:
        """Return the tokens that the last stage has sent: int64 [count] on the host."""
        with self._timed_wait():
            return self._token_return.comm.recv(torch.empty(count, dtype=torch.int64), 1)

    def drop_pending(self) -> None:
        """Forget the sends that have not ended, because the group is about to be formed anew."""
        self._pending_sends.clear()
        self._pending_token_sends.clear()

    def _add_pending(self, pending: deque[PendingSend], limit: int, send: PendingSend) -> None:
        """Keep a pending send, since a backend drops it without a reference. Beyond the limit wait for the oldest."""
        pending.append(send)
        if len(pending) > limit:
            with self._timed_wait():
                pending.popleft().wait()

    @contextmanager
    def _timed_wait(self) -> Iterator[None]:
        begun = time.perf_counter_ns()
        yield
        self.waited_ns += time.perf_counter_ns() - begun
