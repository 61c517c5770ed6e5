"""Steps of one rank with a made-up model."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.kernels.top_outputs import TopOutputs
from shoal.wire.base import Ids
from shoal.wire.ranks import NewSeq, Sampling, SamplingPenalties, SeqOut, StepMask, StepPlan, TokenLogprobs, Work
from shoal.wire.tokens import encode_numbers, encode_tokens
from shoal.worker.runner import Runner
from shoal.worker.sequence_table import SequenceTable
from support.fakes import steady
from worker.made_up import ALONE, ONE_STAGE, SHARE, VOCABULARY, TableModel, no_cache

MAX_MODEL_LEN = 400
GREEDY = Sampling(seed=0)
BLOCKS = tuple(range(100))


class Rank:
    """A rank with one runner. Its plans are numbered in the order in which they are made."""

    def __init__(self, model: TableModel | None = None) -> None:
        self.model = model or TableModel()
        table = SequenceTable(8, MAX_MODEL_LEN, 4, torch.device("cpu"), 4 * len(BLOCKS))
        self.runner = Runner(self.model.causal, no_cache(), table, SHARE, ALONE, ONE_STAGE)
        self.step = -1

    def plan(self, *works: Work, new: Sequence[NewSeq] = (), released: Ids = ()) -> StepPlan:
        self.step += 1
        return StepPlan(9, self.step, works, tuple(new), released)

    def run(self, *works: Work, new: Sequence[NewSeq] = ()) -> tuple[SeqOut, ...]:
        plan = self.plan(*works, new=new)
        result = self.runner.execute(plan)
        assert result is not None
        assert (result.incarnation, result.step) == (9, plan.step)
        assert 0 <= result.times.forward_us <= result.times.total_us
        return result.out

    def start(self, seq: int, prompt: Sequence[int], sampling: Sampling = GREEDY) -> SeqOut:
        """Run a whole prompt in one step, with blocks for the tokens that follow, and return its output."""
        (out,) = self.run(Work(seq, 0, len(prompt), True, BLOCKS), new=[new(seq, prompt, sampling)])
        return out


def new(seq: int, tokens: Sequence[int], sampling: Sampling = GREEDY, epoch: int = 0) -> NewSeq:
    return NewSeq(seq, epoch, encode_tokens(list(tokens)), len(tokens), (), sampling)


def test_a_step_draws_a_token_for_each_sequence() -> None:
    rank = Rank()
    works = [Work(1, 0, 3, True, (1,)), Work(2, 0, 1, True, (2,)), Work(3, 0, 2, False, (3,))]
    out = rank.run(*works, new=[new(1, [7, 8, 9]), new(2, [4], epoch=5), new(3, [1, 2, 3])])
    assert out == (SeqOut(2, 5, (rank.model.next(4),)), SeqOut(1, 0, (rank.model.next(9),)))


class TopModel(TableModel):
    """A model whose head gives top tokens, which are the first of the largest logits."""

    def top_tokens(self, hidden: Tensor, start: int) -> TopOutputs | None:
        values, columns = self.table[hidden[:, 0].long()].max(1)
        return values, columns + start


def test_greedy_tokens_need_no_logits_but_others_do() -> None:
    rank = Rank(TopModel())
    out = rank.run(Work(1, 0, 1, True, (1,)), Work(2, 0, 1, True, (2,)), new=[new(1, [7]), new(2, [4])])
    assert out == (SeqOut(1, 0, (rank.model.next(7),)), SeqOut(2, 0, (rank.model.next(4),)))
    assert rank.model.rows == []
    rank.run(Work(3, 0, 1, True, (3,)), new=[new(3, [9], Sampling(seed=0, temperature=1.0))])
    rank.run(Work(4, 0, 1, True, (4,)), new=[new(4, [9], Sampling(seed=0, logprobs=1))])
    assert rank.model.rows == [1, 1]


def test_a_plan_without_work_has_an_empty_result() -> None:
    rank = Rank()
    rank.start(1, [5])
    result = rank.runner.execute(rank.plan(released=(1,)))
    assert result is not None
    assert result.out == ()
    assert len(rank.model.steps) == 1
    rank.start(1, [5])  # the sequence was released, otherwise it could not be added again


# --- drafts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("right", range(4))
def test_drafts_are_accepted_up_to_the_first_wrong_draft(right: int) -> None:
    rank = Rank()
    (first,) = rank.start(1, [3]).tokens
    true = rank.model.chain(first, 4)
    drafts = true[:right] + [(token + 1) % VOCABULARY for token in true[right : right + 1]] + true[right + 1 :]
    (out,) = rank.run(Work(1, 1, 4, True, drafts=tuple(drafts[:3])))
    assert out.tokens == tuple(true[: right + 1])
    start = 1 + len(out.tokens)
    (after,) = rank.run(Work(1, start, 1, True))
    assert rank.model.steps[-1][0] == [out.tokens[-1]]
    assert after.tokens == (rank.model.next(out.tokens[-1]),)


PARAMETERS = st.builds(
    Sampling,
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.0, 0.4, 1.0]),
    top_k=st.sampled_from([0, 3]),
    top_p=st.sampled_from([1.0, 0.9]),
    penalties=st.sampled_from([None, SamplingPenalties(0.5, 0.5, 1.5)]),
    min_tokens=st.sampled_from([0, 4]),
    ends=st.just(encode_tokens(range(0, VOCABULARY, 3))),
    banned=st.sampled_from([(), tuple((token,) for token in range(1, 9)) + ((10, 11),)]),
)


@settings(steady, max_examples=25)
@given(sampling=PARAMETERS, prompt=st.integers(0, VOCABULARY - 1), data=st.data())
def test_drafts_do_not_change_the_drawn_tokens(sampling: Sampling, prompt: int, data: st.DataObject) -> None:
    """This is true of greedy and random tokens, and of rules that depend on the text so far."""
    plain, count = Rank(), 12
    expected = list(plain.start(1, [prompt], sampling).tokens)
    for position in range(1, count):
        expected += plain.run(Work(1, position, 1, True))[0].tokens
    rank = Rank()
    found = list(rank.start(1, [prompt], sampling).tokens)
    while len(found) < count:
        most = count - len(found) - 1
        right = data.draw(st.integers(0, min(most, 3)))
        drafts = expected[len(found) : len(found) + right]
        if right < most:
            drafts += data.draw(st.lists(st.integers(0, VOCABULARY - 1), max_size=2))
        (out,) = rank.run(Work(1, len(found), 1 + len(drafts), True, drafts=tuple(drafts)))
        assert len(out.tokens) > right
        found += out.tokens
    assert found[:count] == expected


# --- masks -------------------------------------------------------------------------------------------------------


def bits(*rows: Sequence[int]) -> bytes:
    """Return rows of a mask, with two words each."""
    return b"".join(sum(1 << token for token in row).to_bytes(8, "little") for row in rows)


def test_a_masked_step_has_its_result_only_after_its_mask() -> None:
    rank = Rank()
    rank.start(1, [5])
    assert rank.runner.execute(rank.plan(Work(1, 1, 1, True, masked=True))) is None
    for wrong in (rank.step - 1, rank.step + 1):
        assert rank.runner.apply_mask(StepMask(9, wrong, bits([11]), 2)) is None
    result = rank.runner.apply_mask(StepMask(9, rank.step, bits([11]), 2))
    assert result is not None
    assert result.step == rank.step
    assert result.out == (SeqOut(1, 0, (11,)),)
    assert rank.runner.apply_mask(StepMask(9, rank.step, bits([11]), 2)) is None, "this step already has its result"
    (after,) = rank.run(Work(1, 2, 1, True))
    assert after.tokens == (rank.model.next(11),)


def test_a_mask_without_a_plan_is_ignored() -> None:
    assert Rank().runner.apply_mask(StepMask(9, 0, bits([1]), 2)) is None


def test_a_mask_limits_only_its_own_sequence() -> None:
    rank = Rank()
    rank.start(1, [5])
    rank.start(2, [6])
    works = [Work(2, 1, 1, True), Work(1, 1, 1, True, masked=True)]
    last = [rank.model.next(6), rank.model.next(5)]
    assert rank.runner.execute(rank.plan(*works)) is None
    allowed = [2, 9, 33, 39]
    result = rank.runner.apply_mask(StepMask(9, rank.step, bits(allowed), 2))
    assert result is not None
    best = max(allowed, key=lambda token: float(rank.model.table[last[1], token]))
    assert [out.tokens for out in result.out] == [(rank.model.next(last[0]),), (best,)]


def test_each_draft_has_a_row_of_the_mask() -> None:
    """The first draft is allowed by its row of the mask, and the second is not."""
    rank = Rank()
    rank.start(1, [5])
    assert rank.runner.execute(rank.plan(Work(1, 1, 3, True, drafts=(7, 8), masked=True))) is None
    result = rank.runner.apply_mask(StepMask(9, rank.step, bits([7], [30], [31]), 2))
    assert result is not None
    assert result.out[0].tokens == (7, 30)


def test_a_mask_is_applied_together_with_banned_tokens() -> None:
    rank = Rank()
    rank.start(1, [5], Sampling(seed=0, banned=((7,), (8,))))
    assert rank.runner.execute(rank.plan(Work(1, 1, 1, True, masked=True))) is None
    result = rank.runner.apply_mask(StepMask(9, rank.step, bits([7, 8, 9]), 2))
    assert result is not None
    assert result.out[0].tokens == (9,)


# --- log-probabilities -------------------------------------------------------------------------------------------


def check_entry(entry: TokenLogprobs, model: TableModel, before: int, token: int, count: int) -> None:
    """Check the log-probabilities of `token` after the token `before`."""
    row = model.table[before].double().log_softmax(0)
    best = row.topk(count)
    assert entry.ids == tuple(best.indices.tolist())
    # The tolerance allows for a sum of 40 terms in float32.
    assert entry.chosen == pytest.approx(float(row[token]), abs=1e-5)
    assert entry.values == pytest.approx(best.values.tolist(), abs=1e-5)
    assert entry.rank == 1 + int((row > row[token]).sum())


def test_each_sequence_gets_its_requested_number_of_logprobs() -> None:
    rank = Rank()
    counts = {1: 3, 2: -1, 3: 0, 4: 2**31 - 1}
    news = [new(seq, [seq], Sampling(seed=seq, temperature=2.0, logprobs=count)) for seq, count in counts.items()]
    works = [Work(seq, 0, 1, True, (seq,)) for seq in counts]
    for out in rank.run(*works, new=news):
        if counts[out.seq] < 0:
            assert out.logprobs == ()
            continue
        (entry,) = out.logprobs
        check_entry(entry, rank.model, out.seq, out.tokens[0], min(counts[out.seq], VOCABULARY))


def test_every_accepted_token_has_logprobs() -> None:
    rank = Rank()
    sampling = Sampling(seed=0, logprobs=2)
    (first,) = rank.start(1, [3], sampling).tokens
    rank.start(2, [4])
    true = rank.model.chain(first, 3)
    with_drafts = Work(1, 1, 4, True, drafts=(true[0], true[1], (true[2] + 1) % VOCABULARY))
    part, plain = sorted(rank.run(with_drafts, Work(2, 1, 1, True)), key=lambda out: out.seq)
    assert part.tokens == tuple(true)
    assert len(part.logprobs) == 3
    for before, token, entry in zip([first, *true], true, part.logprobs, strict=False):
        check_entry(entry, rank.model, before, token, 2)
    assert plain.logprobs == ()


def test_logprobs_are_computed_before_edits() -> None:
    rank = Rank()
    sampling = Sampling(
        seed=0, logprobs=2, allowed=encode_tokens([6]), bias_ids=encode_tokens([6]), bias_values=encode_numbers([50.0])
    )
    out = rank.start(1, [3], sampling)
    assert out.tokens == (6,)
    check_entry(out.logprobs[0], rank.model, 3, 6, 2)


def prompt_of(length: int) -> list[int]:
    return [(7 * i * i + i) % VOCABULARY for i in range(length)]


def check_prompt(found: Sequence[TokenLogprobs], model: TableModel, prompt: Sequence[int], count: int) -> None:
    assert len(found) == len(prompt) - 1
    for before, token, entry in zip(prompt, prompt[1:], found, strict=False):
        check_entry(entry, model, before, token, count)


def test_logits_of_a_prompt_are_computed_in_several_parts() -> None:
    rank, prompt = Rank(), prompt_of(150)
    out = rank.start(1, prompt, Sampling(seed=0, prompt_logprobs=2))
    assert rank.model.rows == [1, 64, 64, 21]
    assert out.tokens == (rank.model.next(prompt[-1]),)
    assert out.logprobs == ()
    assert out.prompt_logprobs is not None
    assert out.prompt_logprobs.start == 1
    check_prompt(out.prompt_logprobs.entries, rank.model, prompt, 2)
    rank.model.rows.clear()
    (after,) = rank.run(Work(1, len(prompt), 1, True))
    assert after.prompt_logprobs is None
    assert rank.model.rows == [1]


@pytest.mark.parametrize("chunks", [[10], [1] * 10, [4, 6], [9, 1], [3, 3, 3, 1]])
def test_prompt_logprobs_of_chunks_do_not_overlap(chunks: list[int]) -> None:
    """Another sequence in the same steps asks for no log-probabilities."""
    rank, prompt, start = Rank(), prompt_of(10), 0
    found: dict[int, TokenLogprobs] = {}
    rank.start(2, [6])
    news = [new(1, prompt, Sampling(seed=0, prompt_logprobs=1))]
    for i, count in enumerate(chunks):
        last = start + count == len(prompt)
        blocks = BLOCKS[20:23] if i == 0 else ()
        out = {
            each.seq: each
            for each in rank.run(
                Work(1, start, count, last, blocks), Work(2, 1 + i, 1, True), new=news if i == 0 else ()
            )
        }
        assert len(out[2].tokens) == 1
        assert out[2].prompt_logprobs is None
        if last:
            assert out[1].tokens == (rank.model.next(prompt[-1]),)
        if 1 in out and out[1].prompt_logprobs is not None:
            part = out[1].prompt_logprobs
            assert not set(range(part.start, part.start + len(part.entries))) & set(found)
            found |= dict(enumerate(part.entries, part.start))
            assert out[1].tokens == () or last
        start += count
    assert list(found) == list(range(1, len(prompt)))
    check_prompt(list(found.values()), rank.model, prompt, 1)


def test_a_masked_step_returns_prompt_logprobs() -> None:
    rank, prompt = Rank(), prompt_of(5)
    work = Work(1, 0, 5, True, BLOCKS, masked=True)
    assert rank.runner.execute(rank.plan(work, new=[new(1, prompt, Sampling(seed=0, prompt_logprobs=1))])) is None
    result = rank.runner.apply_mask(StepMask(9, rank.step, bits([12]), 2))
    assert result is not None
    (out,) = result.out
    assert out.tokens == (12,)
    assert out.prompt_logprobs is not None
    check_prompt(out.prompt_logprobs.entries, rank.model, prompt, 1)


def test_several_prompts_of_a_step_get_their_logprobs() -> None:
    rank, prompts = Rank(), {1: prompt_of(9), 2: prompt_of(90)[80:], 3: [5]}
    news = [new(seq, prompt, Sampling(seed=0, prompt_logprobs=seq)) for seq, prompt in prompts.items()]
    works = [Work(seq, 0, len(prompt), True, BLOCKS[4 * seq :]) for seq, prompt in prompts.items()]
    out = {each.seq: each.prompt_logprobs for each in rank.run(*works, new=news)}
    assert out[3] is None, "a prompt of one token has no log-probabilities"
    for seq in (1, 2):
        part = out[seq]
        assert part is not None
        check_prompt(part.entries, rank.model, prompts[seq], seq)
