"""What a request's output must look like, as far as its grammar has said.

Grammars are followed elsewhere (`protocols.Grammars`), and answer when they have an answer. A verdict is about the
place behind the last known token; with it the request can be planned, and what was drawn can be judged.
"""

from dataclasses import dataclass

from shoal.wire.base import Ids
from shoal.wire.grammars import Verdict

_MOST_LOSSES = 3  # of whoever follows the output, before it is given up
_ELSE = "the request's other parameters forbid every token that may follow"


@dataclass(slots=True)
class Constraint:
    verdict: Verdict | None = None  # behind the last known token; None: it is on its way
    cost_us: int = 0  # processor time of the last verdict
    foreseen: bool = False  # the verdict on its way will be there before the ranks need it
    losses: int = 0

    @property
    def awaited(self) -> bool:
        """Must planning wait for the verdict?"""
        return self.verdict is None and not self.foreseen

    @property
    def drafts(self) -> Ids:
        """Guesses that the grammar allows."""
        return self.verdict.drafts if self.verdict is not None else ()

    def rows(self, places: int) -> bytes:
        """Masks for the place behind the last known token, and behind the drafts that follow it."""
        verdict = self.verdict
        assert verdict is not None
        return verdict.masks[: places * (len(verdict.masks) // len(verdict.ended))]

    def objection(self, place: int, token: int) -> str:
        """Why a token that was drawn behind `place` drafts is none that the output may have; "" where it may.

        Where a mask and other parameters leave no token, ranks draw what they can.
        """
        assert self.verdict is not None
        size = len(self.verdict.masks) // len(self.verdict.ended)
        row = self.verdict.masks[place * size : (place + 1) * size]
        allowed = token // 8 < size and row[token // 8] >> token % 8 & 1
        return "" if allowed else f"structured_outputs can't be obeyed: {_ELSE}"

    def ends_behind(self, place: int) -> bool:
        """Is the output complete behind so many drafts?"""
        return self.verdict is not None and place < len(self.verdict.ended) and self.verdict.ended[place]

    def lost(self) -> bool:
        """Notes that nobody follows the output any more. True: it should be followed anew."""
        self.losses += 1
        return self.losses < _MOST_LOSSES
