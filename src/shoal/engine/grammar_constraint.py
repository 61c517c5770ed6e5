"""The verdicts of a grammar on one request's output, as far as they are known.

Grammars are followed elsewhere (`protocols.Grammars`), which may take its time. A verdict is about the place behind the
last known token; with it the request can be planned, and the token drawn there can be checked.
"""

from dataclasses import dataclass

from shoal.errors import RequestError, structured_outputs_error
from shoal.wire.base import Ids
from shoal.wire.grammars import Verdict

_MOST_LOSSES = 3  # how often the process that follows an output may be lost before the request is given up


@dataclass(slots=True)
class Constraint:
    verdict: Verdict | None = None  # behind the last known token; None: it is on its way
    cost_us: int = 0  # processor time of the last verdict
    foreseen: bool = False  # the verdict on its way is expected before the ranks need it
    losses: int = 0

    @property
    def awaited(self) -> bool:
        """Return whether planning must wait for the verdict."""
        return self.verdict is None and not self.foreseen

    @property
    def drafts(self) -> Ids:
        """The drafts that the grammar allows."""
        return self.verdict.drafts if self.verdict is not None else ()

    def masks(self, places: int) -> bytes:
        """Return the masks of the place behind the last known token and of those behind the drafts that follow it."""
        verdict = self.verdict
        assert verdict is not None
        return verdict.masks[: places * (len(verdict.masks) // len(verdict.ended))]

    def objection(self, place: int, token: int) -> RequestError | None:
        """Return why the output may not have a token that was drawn behind `place` drafts; None if it may.

        Where a mask and other parameters together leave no token, ranks draw one that is not allowed.
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
        """Return whether the output is complete behind so many drafts."""
        return self.verdict is not None and place < len(self.verdict.ended) and self.verdict.ended[place]

    def note_loss(self) -> bool:
        """Note that nobody follows the output any more; return whether it should be followed anew."""
        self.losses += 1
        return self.losses < _MOST_LOSSES
