"""Edits of logits before tokens are drawn: masks, allowed and forbidden tokens, biases, penalties.

Edits have global token ids and are the same on every rank; a rank applies them to its share of the vocabulary. Most are
pairs of a row and a token id, so their cost depends on the number of pairs and not on the vocabulary. Edits that may
name most of the vocabulary are bits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.kernels.sampling import sampling_kernels

NEVER = float("-inf")  # the logit of a token that must not be drawn


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pairs of a row and a token id. Ids outside the vocabulary have no effect."""

    rows: Tensor  # int64 [k]
    ids: Tensor  # int64 [k]


@dataclass(frozen=True, slots=True)
class Masks:
    """The tokens that a grammar or a list allows in some rows. No row appears twice."""

    rows: Tensor  # int64 [r]
    bits: Tensor  # int32 [r, words]; bit i of word w allows token 32 * w + i; tokens beyond the last word are forbidden


@dataclass(frozen=True, slots=True)
class Bias:
    """Numbers that are added to logits. If a pair of row and id appears twice, both numbers are added."""

    rows: Tensor  # int64 [k]
    ids: Tensor  # int64 [k]
    values: Tensor  # float32 [k]


@dataclass(frozen=True, slots=True)
class Penalties:
    """Penalties for the tokens that a sequence already has. No pair appears twice; rows without pairs have none."""

    rows: Tensor  # int64 [k]
    ids: Tensor  # int64 [k]
    counts: Tensor  # int32 [k]: how often the output has the token; 0 where only the prompt has it
    presence: Tensor  # float32 [m], by row
    frequency: Tensor  # float32 [m], by row
    repetition: Tensor  # float32 [m], by row


@dataclass(frozen=True, slots=True)
class Edits:
    """The edits of a step's logits, applied in the order of the fields. None: no edits of this kind."""

    masks: Masks | None = None
    allowed: Masks | None = None
    forbidden: Pairs | None = None
    bias: Bias | None = None
    penalties: Penalties | None = None

    def restrictions(self) -> "Edits | None":
        """Return only those edits that forbid tokens; None if there are none."""
        if self.masks is None and self.allowed is None and self.forbidden is None:
            return None
        return Edits(self.masks, self.allowed, self.forbidden)


def apply_edits(logits: Tensor, start: int, edits: Edits) -> None:
    """Edit logits in place. logits: float32 [m, columns]; column c belongs to token `start` + c."""
    for masks in (edits.masks, edits.allowed):
        if masks is not None:
            sampling_kernels(logits).apply_masks(logits, start, masks.rows, masks.bits)
    if edits.forbidden is not None:
        rows, columns, _ = _own(logits, start, edits.forbidden.rows, edits.forbidden.ids)
        logits[rows, columns] = NEVER
    if edits.bias is not None:
        rows, columns, own = _own(logits, start, edits.bias.rows, edits.bias.ids)
        logits.index_put_((rows, columns), edits.bias.values[own], accumulate=True)
    if edits.penalties is not None:
        _penalize(logits, start, edits.penalties)


def _own(logits: Tensor, start: int, rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pairs whose token is among the columns: their rows, their columns, and their indices in the input."""
    columns = ids - start
    own = ((columns >= 0) & (columns < logits.shape[1])).nonzero().squeeze(1)
    return rows[own], columns[own], own


def _penalize(logits: Tensor, start: int, penalties: Penalties) -> None:
    """Apply the repetition penalty (Keskar et al., 2019), then frequency and presence penalties, in place."""
    rows, columns, own = _own(logits, start, penalties.rows, penalties.ids)
    counts = penalties.counts[own]
    value = logits[rows, columns]
    repetition = penalties.repetition[rows]
    value = torch.where(value > 0, value / repetition, value * repetition)
    value = value - penalties.frequency[rows] * counts - penalties.presence[rows] * (counts > 0)
    logits[rows, columns] = value
