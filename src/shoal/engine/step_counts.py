"""Counts of the steps of an engine, for its stats."""

from shoal.wire.ranks import StepPlan, StepResult

_NUM_TOKEN_BUCKETS = 24  # buckets of the histogram of tokens per step; the upper bounds are 1, 2, 4, ...


class StepCounts:
    """How many steps were computed, with how many tokens, in which time."""

    def __init__(self) -> None:
        self.steps = 0
        self.total_us = 0
        self.forward_us = 0
        self.tokens = 0
        self.iteration_tokens = [0] * _NUM_TOKEN_BUCKETS

    def note_plan(self, plan: StepPlan) -> None:
        tokens = sum(work.count for work in plan.work)
        if tokens:
            self.iteration_tokens[min((tokens - 1).bit_length(), _NUM_TOKEN_BUCKETS - 1)] += 1
            self.tokens += tokens

    def note_result(self, result: StepResult) -> None:
        self.steps += 1
        self.total_us += result.times.total_us
        self.forward_us += result.times.forward_us
