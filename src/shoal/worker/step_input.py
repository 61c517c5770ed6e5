"""The tensors of a step, as a rank's table of sequences gives them to the runner."""

from dataclasses import dataclass

from torch import Tensor

from shoal.kernels.base import PagedBatch
from shoal.wire.ranks import Work
from shoal.worker.sampler import SamplingRows


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Consecutive tokens of a prompt whose log-probabilities are wanted.

    They are computed from the rows of the tokens before them.
    """

    seq: int
    start: int  # position of the first target
    targets: tuple[int, ...]  # the tokens whose log-probabilities are wanted
    logprobs: int  # for how many of the likeliest tokens log-probabilities are wanted, in addition


@dataclass(frozen=True, slots=True)
class StepInput:
    """The tensors of a step of n tokens, after m of which a token is drawn.

    The next step overwrites those of a plain one. Without the native library no step is known to be plain.
    """

    tokens: Tensor  # int64 [n]
    batch: PagedBatch
    logit_rows: Tensor | None  # int64 [m + p]: tokens after which one is drawn, then those of `prompts`; None: all n
    sampled: tuple[Work, ...]  # the works of the m rows, in the order of the rows; a work has 1 + len(drafts) rows
    sampling: SamplingRows | None  # None: this stage draws no tokens in this step
    masked_rows: tuple[int, ...]  # those of the m rows that have a row in the step's mask, in the order of the mask
    prompts: tuple[PromptRows, ...]
    plain: bool = False  # every sequence computes one token and draws one, without drafts, edits and log-probabilities
