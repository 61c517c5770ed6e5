"""What an output gains while it grows, as streams hand it out."""

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.outputs import FinishReason, Logprobs


@dataclass(frozen=True, slots=True)
class Delta:
    """New parts of one output. `text` is certain: nothing that comes later changes it. In total the texts of an
    output's deltas are the text that it has without streaming, and so are tokens and log-probabilities. A token's
    offset may lie behind the texts so far. If its text turns out to belong to a stop text, the output ends before it.

    The last one of an output has a `finish_reason`.
    """

    index: int  # of the output, below `n`
    text: str
    token_ids: tuple[int, ...]
    logprobs: Sequence[Logprobs] | None = None  # one a token, where they were asked for
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    text_offsets: tuple[int, ...] | None = None  # with `logprobs`: where each token begins in the output's whole text
