"""Deltas: the parts of an output that a stream returns while the output grows."""

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.outputs import FinishReason, Logprobs


@dataclass(frozen=True, slots=True)
class Delta:
    """New text, tokens and log-probabilities of one output.

    The deltas of an output, put together, are what the output is without streaming. Text in a delta is final. Text that
    may still turn out to be part of a stop text is held back, so the offset of a token may be larger than the length of
    the text so far; if it was part of a stop text, the output ends before it.
    """

    index: int  # the number of the output among those of its prompt
    text: str
    token_ids: tuple[int, ...]
    logprobs: Sequence[Logprobs] | None = None  # one for each token, if they were asked for
    finish_reason: FinishReason | None = None  # in the last delta of the output
    stop_reason: int | str | None = None  # in the last delta: the token or text at which the output stopped
    text_offsets: tuple[int, ...] | None = None  # with `logprobs`: where each token begins in the text of the output
