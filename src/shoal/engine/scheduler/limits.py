"""The limits of a scheduler."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    window: int | None = None  # the longest attention window, in tokens; None: some layer sees all tokens
    stages: int = 1  # stages of the pipeline, which works on as many steps at a time
    prompt_logprobs: int | None = None  # the most prompt tokens with log-probabilities in a step; None: any number
