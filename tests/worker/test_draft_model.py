"""The drafts of a draft model, and the places to which it writes their keys and values."""

from collections.abc import Sequence

import pytest
import torch

from shoal.wire.ranks import NewSeq, Sampling, SeqOut, StepPlan, Work
from shoal.wire.tokens import encode_tokens
from shoal.worker.draft_model import DraftModel
from shoal.worker.runner import Runner
from shoal.worker.sequence_table import SequenceTable
from worker.made_up import ALONE, ONE_STAGE, SHARE, VOCABULARY, TableModel, no_cache

SIZE = 4
SCRATCH = 1000
COUNT = 3
GREEDY = Sampling(seed=0)


class Rank:
    def __init__(self, *, same: bool = True, max_model_len: int = 64) -> None:
        self.model = TableModel()
        self.draft = TableModel(0 if same else 1)
        table = SequenceTable(4, max_model_len, SIZE, torch.device("cpu"), SCRATCH)
        draft = DraftModel(self.draft.causal, no_cache(), table, SHARE, ALONE, count=COUNT)
        self.runner = Runner(*(self.model.causal, no_cache(), table, SHARE, ALONE, ONE_STAGE), draft=draft)
        self.step = -1

    def run(self, *works: Work, new: Sequence[NewSeq] = ()) -> dict[int, SeqOut]:
        self.step += 1
        self.draft.steps.clear()
        self.model.steps.clear()
        result = self.runner.execute(StepPlan(0, self.step, works, tuple(new)))
        assert result is not None
        return {out.seq: out for out in result.out}

    def places(self) -> list[tuple[list[int], list[int], list[int]]]:
        """Return the tokens, positions and slots of each step of the draft model.

        The first step computes the tokens that the large model computes too.
        """
        return [(tokens, batch.positions.tolist(), batch.slots.tolist()) for tokens, batch in self.draft.steps]


def new(seq: int, tokens: Sequence[int], sampling: Sampling = GREEDY) -> NewSeq:
    return NewSeq(seq, 0, encode_tokens(list(tokens)), len(tokens), (), sampling)


def test_drafts_continue_the_drawn_token_as_the_draft_model_would() -> None:
    rank = Rank(same=False)
    out = rank.run(Work(1, 0, 3, True, (5, 6)), new=[new(1, [7, 8, 9])])[1]
    assert out.tokens == (rank.model.next(9),)
    assert out.drafts == tuple(rank.draft.chain(out.tokens[0], COUNT))


def test_the_draft_model_computes_the_tokens_of_the_model_and_then_its_drafts() -> None:
    rank = Rank(same=False)
    out = rank.run(Work(1, 0, 3, True, (5, 6)), new=[new(1, [7, 8, 9])])[1]
    drafts = list(out.drafts)
    assert rank.places() == [
        ([7, 8, 9], [0, 1, 2], [20, 21, 22]),
        ([out.tokens[0]], [3], [23]),
        ([drafts[0]], [4], [24]),
        ([drafts[1]], [5], [25]),
    ]
    assert rank.draft.rows == [1, 1, 1], "logits are computed only for drafts"


def test_a_chunk_without_a_drawn_token_gets_no_drafts() -> None:
    rank = Rank()
    assert rank.run(Work(1, 0, 2, False, (5,)), new=[new(1, [7, 8, 9])]) == {}
    assert rank.places() == [([7, 8], [0, 1], [20, 21])]


def test_after_rejected_drafts_the_draft_model_continues_from_the_last_kept_token() -> None:
    """The cache slots of rejected drafts are written again."""
    rank = Rank()
    (first,) = rank.run(Work(1, 0, 1, True, (5, 6, 7)), new=[new(1, [7])])[1].tokens
    true = rank.model.chain(first, 2)
    drafts = (true[0], (true[1] + 1) % VOCABULARY, 0)
    out = rank.run(Work(1, 1, 4, True, drafts=drafts))[1]
    assert out.tokens == tuple(true)
    assert out.drafts == tuple(rank.draft.chain(true[1], COUNT))
    assert rank.places()[0] == ([first, *drafts], [1, 2, 3, 4], [21, 22, 23, 24])
    assert rank.places()[1] == ([true[1]], [3], [23])


def test_drafts_of_several_sequences_are_computed_together() -> None:
    rank = Rank(same=False)
    works = [Work(1, 0, 2, True, (5, 6)), Work(2, 0, 1, True, (7, 8)), Work(3, 0, 2, False, (9,))]
    out = rank.run(*works, new=[new(1, [7, 8]), new(2, [9]), new(3, [1, 2, 3])])
    assert set(out) == {1, 2}
    for each in out.values():
        assert each.drafts == tuple(rank.draft.chain(each.tokens[0], COUNT))
    assert [positions for _, positions, _ in rank.places()[1:]] == [[1, 2], [2, 3], [3, 4]]


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_drafts_of_the_same_model_are_always_accepted(temperature: float) -> None:
    """The draft model draws with the keys that the model will use for these positions."""
    rank = Rank()
    sampling = Sampling(seed=3, sample_index=2, temperature=temperature)
    out = rank.run(Work(1, 0, 1, True, tuple(range(5, 15))), new=[new(1, [7], sampling)])[1]
    known = 1
    for _ in range(8):
        work = Work(1, known, 1 + COUNT, True, drafts=out.drafts)
        known += 1 + COUNT
        before, out = out, rank.run(work)[1]
        assert out.tokens[:COUNT] == before.drafts


def test_drafts_of_another_model_are_accepted_more_often_than_by_chance() -> None:
    """Drafts are drawn with the same noise as the tokens."""
    rank = Rank(same=False)
    rank.draft.table = rank.model.table + 0.5 * rank.draft.table
    by_chance = float((rank.model.table.softmax(1) * rank.draft.table.softmax(1)).sum(1).mean())
    sampling = Sampling(seed=3, temperature=1.0)
    out = rank.run(Work(1, 0, 1, True, tuple(range(5, 20))), new=[new(1, [7], sampling)])[1]
    known, right, checked = 1, 0, 0
    for _ in range(15):
        out = rank.run(Work(1, known, 1 + COUNT, True, drafts=out.drafts))[1]
        known += len(out.tokens)
        right += len(out.tokens) - 1
        checked += min(len(out.tokens), COUNT)
    assert checked > 20
    assert 2 * by_chance < right / checked < 1


def test_drafts_beyond_the_last_block_are_not_written_to_the_cache() -> None:
    rank = Rank(same=False)
    out = rank.run(Work(1, 0, 3, True, (5,)), new=[new(1, [7, 8, 9])])[1]
    assert [slots for _, _, slots in rank.places()] == [[20, 21, 22], [23], [SCRATCH], [SCRATCH]]
    assert len(out.drafts) == COUNT


def test_drafts_beyond_the_context_length_are_not_written_to_the_cache() -> None:
    """Other sequences still get drafts. The last of the 8 positions is 7."""
    rank = Rank(max_model_len=8)
    works = [Work(1, 0, 6, True, (5, 6)), Work(2, 0, 2, True, (7, 8))]
    news = [new(1, [1, 2, 3, 4, 5, 6]), new(2, [7, 8])]
    outs = rank.run(*works, new=news)
    ended, other = outs[1], outs[2]
    assert [slots for _, _, slots in rank.places()][1:] == [[26, 30], [27, 31], [SCRATCH, 32]]
    assert other.drafts == tuple(rank.draft.chain(other.tokens[0], COUNT))
    assert ended.drafts[:2] == tuple(rank.draft.chain(ended.tokens[0], 2))
