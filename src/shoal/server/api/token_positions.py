"""The log-probabilities of a streamed output, with the places of its tokens in the text."""

from collections import deque

from shoal.llm.deltas import Delta
from shoal.outputs import Logprobs


class TokenPositions:
    """Log-probabilities of one output that wait until the places of their tokens are certain.

    The place of a token is certain once all text before it was sent. Text that is held back may turn out to be a stop
    text, which is never sent.
    """

    def __init__(self) -> None:
        self._sent = 0  # characters of the output
        self._waiting: deque[tuple[int, Logprobs, int]] = deque()

    def take(self, delta: Delta) -> list[tuple[int, Logprobs, int]]:
        """Return (token, log-probabilities, offset) of all tokens that may be sent with the text of a delta."""
        guessed = [self._sent] * len(delta.token_ids)
        offsets = guessed if delta.text_offsets is None else delta.text_offsets
        self._waiting.extend(zip(delta.token_ids, delta.logprobs or (), offsets, strict=False))
        self._sent += len(delta.text)
        ready = []
        while self._waiting and (delta.finish_reason is not None or self._waiting[0][2] <= self._sent):
            token, known, offset = self._waiting.popleft()
            ready.append((token, known, min(offset, self._sent)))
        return ready
