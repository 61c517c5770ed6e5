"""The verdict of a grammar on one request's output, as far as it is known.

The process of a grammar follows the output (`protocols.Grammars`), which may take long. A verdict is about the position
after the last known token. With it the request can be planned, and the token drawn at that position can be checked.
"""

from dataclasses import dataclass

from shoal.errors import RequestError, structured_outputs_error
from shoal.wire.base import Ids
from shoal.wire.grammars import Verdict

_MAX_LOSSES = 3  # the request fails when the process that follows its output has died this often


@dataclass(slots=True)
class Constraint:
    verdict: Verdict | None = None  # about the position after the last known token; None: not here yet
    cost_us: int = 0  # processor time of the last verdict
    foreseen: bool = False  # the next verdict is expected before the ranks need it
    losses: int = 0  # how often the process that follows the output has died

    @property
    def awaited(self) -> bool:
        """Return whether planning must wait for the verdict."""
        return self.verdict is None and not self.foreseen

    @property
    def drafts(self) -> Ids:
        """The drafts that the grammar allows."""
        return self.verdict.drafts if self.verdict is not None else ()

    def masks(self, places: int) -> bytes:
        """Return the masks for the position after the last known token and for those after each draft."""
        verdict = self.verdict
        assert verdict is not None
        return verdict.masks[: places * (len(verdict.masks) // len(verdict.ended))]

    def objection(self, place: int, token: int) -> RequestError | None:
        """Return why the output may not have a token that was drawn after `place` drafts; None if it may.

        Ranks draw a token that is not allowed if the mask and the other parameters together allow none.
        """
        assert self.verdict is not None
        size = len(self.verdict.masks) // len(self.verdict.ended)
        row = self.verdict.masks[place * size : (place + 1) * size]
        allowed = token // 8 < size and row[token // 8] >> token % 8 & 1
        if allowed:
            return None
        return structured_outputs_error(
            "can't be obeyed: the request's other parameters forbid every token that may follow"
        )

    def is_complete_behind(self, place: int) -> bool:
        """Return whether the output is complete after the first `place` drafts."""
        return self.verdict is not None and place < len(self.verdict.ended) and self.verdict.ended[place]

    def note_loss(self) -> bool:
        """Count a death of the process that follows the output. Return whether another process should follow it."""
        self.losses += 1
        return self.losses < _MAX_LOSSES
