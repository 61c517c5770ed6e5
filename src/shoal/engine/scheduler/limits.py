"""The limits that a scheduler keeps to."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    window: int | None = None  # tokens that any layer looks back on, itself included; None: all of them
    stages: int = 1  # of the pipeline, which works on as many steps at a time
    prompt_logprobs: int | None = None  # prompt tokens whose log-probabilities a step may give; None: any number
