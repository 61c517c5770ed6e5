"""The tensors of a step, against a construction token by token."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal import wire
from shoal.engine.request import encode_tokens
from shoal.worker.batch import SequenceTable, StepInput
from shoal.worker.random import row_keys, split_keys
from support.fakes import steady

SIZE = 3
MAX_MODEL_LEN = 24


def table(max_num_seqs: int = 8) -> SequenceTable:
    return SequenceTable(max_num_seqs, MAX_MODEL_LEN, SIZE, torch.device("cpu"))


def admit(seq: int, tokens: list[int], sampling: wire.Sampling | None = None, epoch: int = 0) -> wire.NewSeq:
    return wire.NewSeq(seq, epoch, encode_tokens(tokens), (), sampling or wire.Sampling(seed=0))


def plan(*work: wire.Work, new: tuple[wire.NewSeq, ...] = (), released: tuple[int, ...] = ()) -> wire.StepPlan:
    return wire.StepPlan(0, 0, work, new, released)


SAMPLINGS = st.builds(
    wire.Sampling,
    seed=st.integers(0, 2**64 - 1),
    sample_index=st.integers(0, 3),
    temperature=st.sampled_from([0.0, 0.0, 0.5, 1.0]),
    top_k=st.sampled_from([0, 7]),
    top_p=st.sampled_from([1.0, 0.5]),
    logprobs=st.integers(-1, 2),
)


def check(step: StepInput, works: list[wire.Work], known: dict[int, list[int]], blocks: dict[int, list[int]]) -> None:
    """Row by row: single tokens first, then the others, each in the plan's order."""
    works = [w for w in works if w.count == 1] + [w for w in works if w.count != 1]
    batch = step.batch
    tokens, positions, slots, starts, ends = list[int](), list[int](), list[int](), [0], list[int]()
    for work in works:
        for position in range(work.start, work.start + work.count):
            tokens.append(known[work.seq][position])
            positions.append(position)
            slots.append(blocks[work.seq][position // SIZE] * SIZE + position % SIZE)
        starts.append(len(tokens))
        if work.sample:
            ends.append(len(tokens) - 1)
    assert step.tokens.tolist() == tokens
    assert batch.positions.tolist() == positions
    assert batch.slots.tolist() == slots
    assert batch.query_starts.tolist() == starts
    contexts = [work.start + work.count for work in works]
    assert batch.context_lens.tolist() == contexts == list(batch.host_context_lens)
    assert batch.query_lens == tuple(work.count for work in works)
    assert batch.num_single == sum(work.count == 1 for work in works)
    assert batch.block_size == SIZE
    width = max(-(-context // SIZE) for context in contexts)
    assert batch.block_tables.tolist() == [(blocks[w.seq] + [0] * width)[:width] for w in works]
    assert step.sampled == tuple(w for w in works if w.sample)
    if step.logit_rows is None:
        assert ends == list(range(len(tokens)))
    else:
        assert step.logit_rows.tolist() == ends
    types = {t.dtype for t in (step.tokens, batch.positions, batch.slots)}
    assert types == {torch.int64}
    assert {t.dtype for t in (batch.query_starts, batch.context_lens, batch.block_tables)} == {torch.int32}


@settings(steady, max_examples=80)
@given(data=st.data())
def test_mixed_steps(data: st.DataObject) -> None:
    """Sequences come, are chunked, decode and go, over rows that others have used before."""
    under_test = table(4)
    known, blocks, samplings = dict[int, list[int]](), dict[int, list[int]](), dict[int, wire.Sampling]()
    done: dict[int, int] = {}
    free = list(range(1, 50))
    next_seq = 0
    for _ in range(data.draw(st.integers(1, 6))):
        gone = tuple(seq for seq in list(known) if data.draw(st.integers(0, 4)) == 0)
        for seq in gone:
            free += blocks.pop(seq)
            del known[seq], done[seq], samplings[seq]
        new = []
        while len(known) < 4 and data.draw(st.booleans()):
            tokens = data.draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=12))
            cached = data.draw(st.integers(0, (len(tokens) - 1) // SIZE))
            known[next_seq], samplings[next_seq] = tokens, data.draw(SAMPLINGS)
            blocks[next_seq], done[next_seq] = [free.pop(0) for _ in range(cached)], cached * SIZE
            new.append(wire.NewSeq(next_seq, 0, encode_tokens(tokens), tuple(blocks[next_seq]), samplings[next_seq]))
            next_seq += 1
        works = []
        for seq in data.draw(st.permutations(list(known))):
            count = data.draw(st.integers(0, len(known[seq]) - done[seq]))
            if count == 0 or done[seq] + count > MAX_MODEL_LEN:
                continue
            stop = done[seq] + count
            added = [free.pop(0) for _ in range(-(-stop // SIZE) - len(blocks[seq]))]
            blocks[seq] += added
            works.append(wire.Work(seq, done[seq], count, stop == len(known[seq]), tuple(added)))
            done[seq] = stop
        under_test.apply(plan(*works, new=tuple(new), released=gone))
        assert len(under_test) == len(known)
        if not works:
            continue
        step = under_test.build(works)
        check(step, works, known, blocks)
        check_sampling(step, samplings)
        tokens = [data.draw(st.integers(0, 2**31 - 1)) for _ in step.sampled]
        under_test.record(step.sampled, tokens)
        for work, token in zip(step.sampled, tokens, strict=True):
            known[work.seq].append(token)


def check_sampling(step: StepInput, samplings: dict[int, wire.Sampling]) -> None:
    if not step.sampled:
        assert step.sampling is None
        return
    assert step.sampling is not None
    rows, wanted = step.sampling, [samplings[work.seq] for work in step.sampled]
    assert rows.temperature.tolist() == [s.temperature for s in wanted]
    assert rows.top_k.tolist() == [s.top_k for s in wanted]
    assert rows.top_p.tolist() == [s.top_p for s in wanted]
    assert rows.greedy == all(s.temperature == 0 for s in wanted)
    assert rows.truncated == [i for i, s in enumerate(wanted) if s.temperature > 0 and (s.top_k or s.top_p < 1)]
    assert rows.logprobs == max(s.logprobs for s in wanted)
    if not rows.greedy:
        parts = [(s.seed, s.sample_index, w.start + w.count) for s, w in zip(wanted, step.sampled, strict=True)]
        seeds, indices, positions = (np.array(column, np.uint64) for column in zip(*parts, strict=True))
        assert torch.equal(rows.keys, split_keys(row_keys(seeds, indices, positions)))


def test_a_decode_takes_the_token_that_was_sampled_before_the_engine_saw_it() -> None:
    under_test = table()
    first = wire.Work(7, 0, 2, True, (4,))
    under_test.apply(plan(first, new=(admit(7, [10, 11]),)))
    under_test.record(under_test.build([first]).sampled, [99])
    second = wire.Work(7, 2, 1, True)
    under_test.apply(plan(second))
    step = under_test.build([second])
    assert step.tokens.tolist() == [99]
    assert step.batch.slots.tolist() == [4 * SIZE + 2]
    assert step.logit_rows is None


def test_a_resumed_sequence_starts_from_its_tokens_so_far() -> None:
    under_test = table(1)
    under_test.apply(plan(new=(admit(7, [1, 2]),)))
    work = wire.Work(7, 0, 3, True, (2,))
    under_test.apply(plan(work, new=(admit(7, [1, 2, 3], epoch=1),), released=(7,)))
    assert under_test.build([work]).tokens.tolist() == [1, 2, 3]
    assert under_test.epoch(7) == 1


def test_rows_are_padded_with_zeros_whoever_had_them_before() -> None:
    under_test = table(1)
    under_test.apply(plan(wire.Work(1, 0, 9, True, (5, 6, 7)), new=(admit(1, [1] * 9),)))
    work = wire.Work(2, 0, 7, True, (3, 4))
    under_test.apply(plan(work, new=(admit(2, [1] * 7),), released=(1,)))
    assert under_test.build([work]).batch.block_tables.tolist() == [[3, 4, 0]]


def test_more_sequences_than_rows_are_an_error() -> None:
    under_test = table(1)
    with pytest.raises(IndexError):
        under_test.apply(plan(new=(admit(1, [1]), admit(2, [2]))))


def test_logprobs_are_remembered_by_sequence() -> None:
    under_test = table()
    under_test.apply(plan(new=(admit(1, [1], wire.Sampling(0, logprobs=3)), admit(2, [1]))))
    assert (under_test.logprobs(1), under_test.logprobs(2)) == (3, -1)
