"""Changes to logits before a token is drawn: masks, allowed and forbidden tokens, biases, penalties.

All of it is in global token ids, the same on every rank; a rank applies what falls into its share. Most of it is a
few pairs of (row, token id), so it costs as much as there are pairs, whatever the vocabulary; what may name most of a
vocabulary is bits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.kernels.sampling import sampling_kernels

NEVER = float("-inf")


@dataclass(frozen=True, slots=True)
class Pairs:
    """Tokens of rows. Ids outside of the vocabulary stand for nothing."""

    rows: Tensor  # int64 [k]
    ids: Tensor  # int64 [k]


@dataclass(frozen=True, slots=True)
class Masks:
    """Tokens that a grammar, or a list, allows. Each row at most once."""

    rows: Tensor  # int64 [r]
    bits: Tensor  # int32 [r, words]; bit i of word w allows token 32 * w + i; beyond the last word nothing is allowed


@dataclass(frozen=True, slots=True)
class Bias:
    """Numbers added to logits; those of a pair that is there twice are both added."""

    rows: Tensor  # int64 [k]
    ids: Tensor  # int64 [k]
    values: Tensor  # float32 [k]


@dataclass(frozen=True, slots=True)
class Penalties:
    """Of tokens seen before. Each pair at most once; rows without pairs have no penalties."""

    rows: Tensor  # int64 [k]
    ids: Tensor  # int64 [k]
    counts: Tensor  # int32 [k]: how often the output has the token; 0 where only the prompt has it
    presence: Tensor  # float32 [m], as the next two
    frequency: Tensor
    repetition: Tensor


@dataclass(frozen=True, slots=True)
class Edits:
    """Applied in this order. Each may be None: nothing of the kind."""

    masks: Masks | None = None
    allowed: Masks | None = None
    never: Pairs | None = None
    bias: Bias | None = None
    penalties: Penalties | None = None

    def restrictions(self) -> "Edits | None":
        """What forbids tokens; None if nothing does."""
        if self.masks is None and self.allowed is None and self.never is None:
            return None
        return Edits(self.masks, self.allowed, self.never)


def edit(logits: Tensor, start: int, edits: Edits) -> None:
    """In place. logits: float32 [m, columns], those of the tokens from `start` on."""
    for masks in (edits.masks, edits.allowed):
        if masks is not None:
            sampling_kernels(logits).apply_masks(logits, start, masks.rows, masks.bits)
    if edits.never is not None:
        rows, columns, _ = _own(logits, start, edits.never.rows, edits.never.ids)
        logits[rows, columns] = NEVER
    if edits.bias is not None:
        rows, columns, own = _own(logits, start, edits.bias.rows, edits.bias.ids)
        logits.index_put_((rows, columns), edits.bias.values[own], accumulate=True)
    if edits.penalties is not None:
        _penalize(logits, start, edits.penalties)


def _own(logits: Tensor, start: int, rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs that fall into the share, as rows and columns, and which ones they are."""
    columns = ids - start
    own = ((columns >= 0) & (columns < logits.shape[1])).nonzero().squeeze(1)
    return rows[own], columns[own], own


def _penalize(logits: Tensor, start: int, penalties: Penalties) -> None:
    """Repetition (Keskar et al., 2019), then frequency and presence."""
    rows, columns, own = _own(logits, start, penalties.rows, penalties.ids)
    counts = penalties.counts[own]
    value = logits[rows, columns]
    repetition = penalties.repetition[rows]
    value = torch.where(value > 0, value / repetition, value * repetition)
    value = value - penalties.frequency[rows] * counts - penalties.presence[rows] * (counts > 0)
    logits[rows, columns] = value
