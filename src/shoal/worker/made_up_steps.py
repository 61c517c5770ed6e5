"""Steps with made-up sequences: to measure memory, and to warm up."""

from collections.abc import Sequence

from shoal.wire.ranks import NewSeq, Sampling, SamplingPenalties, StepPlan, Work


def made_up_steps(
    lengths: Sequence[int], block_size: int, num_drafts: int = 0, *, decode: bool = False
) -> list[StepPlan]:
    """Return the plans of steps with made-up sequences, the last of which has the ranks forget them.

    They are in the first KV blocks. Their keys and values are overwritten later.

    Args:
        lengths: the number of prompt tokens of each sequence.
        num_drafts: the number of drafts after each prompt.
        decode: also return a step in which each sequence computes its first drawn token.
    """
    sampling = Sampling(seed=0, temperature=1.0, top_p=0.9, penalties=SamplingPenalties(1.0), logprobs=1)
    new, work, first = [], [], 0
    for i, length in enumerate(lengths):
        count = -(-(length + num_drafts + decode) // block_size)
        seq, blocks = -1 - i, tuple(range(first, first + count))
        first += count
        new.append(NewSeq(seq, 0, bytes(4 * length), length, (), sampling))
        work.append(Work(seq, 0, length + num_drafts, True, blocks, (0,) * num_drafts))
    plans = [StepPlan(0, -1, tuple(work), new=tuple(new))]
    if decode:
        plans.append(StepPlan(0, -1, tuple(Work(each.seq, each.count, 1, True) for each in work)))
    plans.append(StepPlan(0, -1, (), released=tuple(each.seq for each in work)))
    return plans
