"""The tensors of a step, compared with tensors that are built token by token."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.kernels.native import load_native
from shoal.wire.base import Ids
from shoal.wire.ranks import NewSeq, Sampling, SamplingPenalties, StepPlan, Work
from shoal.wire.tokens import encode_numbers, encode_tokens
from shoal.worker.logit_edits import Edits
from shoal.worker.random import row_keys, split_keys
from shoal.worker.sampling_rules import EditsBuilder, SamplingRules
from shoal.worker.sequence_table import SequenceTable
from shoal.worker.step_input import PromptRows, StepInput
from support.fakes import steady

SIZE = 3
MAX_MODEL_LEN = 24
SCRATCH = 1000
CPU = torch.device("cpu")
TOKENS = st.integers(0, 2**31 - 1)


def table(max_num_seqs: int = 8) -> SequenceTable:
    return SequenceTable(max_num_seqs, MAX_MODEL_LEN, SIZE, CPU, SCRATCH)


def admit(
    seq: int,
    tokens: list[int],
    sampling: Sampling | None = None,
    epoch: int = 0,
    prompt_len: int | None = None,
    blocks: Ids = (),
) -> NewSeq:
    length = len(tokens) if prompt_len is None else prompt_len
    return NewSeq(seq, epoch, encode_tokens(tokens), length, blocks, sampling or Sampling(seed=0))


def plan(*work: Work, new: tuple[NewSeq, ...] = (), released: tuple[int, ...] = ()) -> StepPlan:
    return StepPlan(0, 0, work, new, released)


def step_of(under_test: SequenceTable, *work: Work, new: Sequence[NewSeq] = ()) -> StepInput:
    under_test.apply(plan(*work, new=tuple(new)))
    return under_test.build(work)


SAMPLINGS = st.builds(
    Sampling,
    seed=st.integers(0, 2**64 - 1),
    sample_index=st.integers(0, 3),
    temperature=st.sampled_from([0.0, 0.0, 0.5, 1.0]),
    top_k=st.sampled_from([0, 7]),
    top_p=st.sampled_from([1.0, 0.5]),
    min_p=st.sampled_from([0.0, 0.25]),
    penalties=st.sampled_from([None, None, SamplingPenalties(0.5, 0.25, 2.0)]),
    min_tokens=st.sampled_from([0, 0, 3]),
    ends=st.just(encode_tokens([5])),
    bias_ids=st.just(encode_tokens([3])),
    bias_values=st.sampled_from([encode_numbers([1.5]), encode_numbers([-2.0])]),
    allowed=st.sampled_from([None, None, encode_tokens([1, 2])]),
    banned=st.sampled_from([(), ((7,), (8, 9))]),
    logprobs=st.integers(-1, 2),
    prompt_logprobs=st.sampled_from([-1, -1, 0, 2]),
)


PLAIN_SAMPLINGS = st.builds(
    Sampling,
    seed=st.integers(0, 2**64 - 1),
    temperature=st.sampled_from([0.0, 0.0, 0.0, 1.0]),
    top_k=st.sampled_from([0, 7]),
    min_p=st.sampled_from([0.0, 0.25]),
)


@dataclass
class Known:
    """The facts that the test knows about a sequence."""

    tokens: list[int]
    prompt_len: int
    blocks: list[int]
    shared: int  # number of positions in shared blocks
    done: int  # number of computed positions
    sampling: Sampling
    masked: bool
    given: int  # number of tokens that it came with
    drafts: list[int] = field(default_factory=list)  # the drafts of the current step

    def token(self, position: int) -> int:
        return (self.tokens + self.drafts)[position]

    def slot(self, position: int) -> int:
        return SCRATCH if position < self.shared else self.blocks[position // SIZE] * SIZE + position % SIZE


def in_step_order(works: Sequence[Work]) -> list[Work]:
    """Return the works in the order of a step: first single tokens with their drafts, then the others."""
    return [w for w in works if is_single(w)] + [w for w in works if not is_single(w)]


def is_single(work: Work) -> bool:
    return work.count == 1 + len(work.drafts)


def as_computed(works: Sequence[Work]) -> list[tuple[int, int, int]]:
    """Return (seq, start, count) of each sequence of the batch. A token and its drafts are sequences of one token."""
    found = []
    for work in in_step_order(works):
        if is_single(work):
            found += [(work.seq, work.start + i, 1) for i in range(work.count)]
        else:
            found.append((work.seq, work.start, work.count))
    return found


def check_batch(step: StepInput, planned: Sequence[Work], known: dict[int, Known]) -> None:
    works, batch = as_computed(planned), step.batch
    tokens, positions, slots, starts = list[int](), list[int](), list[int](), [0]
    for seq, start, count in works:
        for position in range(start, start + count):
            tokens.append(known[seq].token(position))
            positions.append(position)
            slots.append(known[seq].slot(position))
        starts.append(len(tokens))
    assert step.tokens.tolist() == tokens
    assert batch.positions.tolist() == positions
    assert batch.slots.tolist() == slots
    assert batch.query_starts.tolist() == starts
    contexts = [start + count for _, start, count in works]
    assert batch.context_lens.tolist() == contexts == list(batch.host_context_lens)
    assert batch.query_lens == tuple(count for *_, count in works)
    assert batch.num_single == sum(count == 1 for *_, count in works)
    assert batch.block_size == SIZE
    for (seq, *_), context, blocks in zip(works, contexts, batch.block_tables.tolist(), strict=True):
        used = -(-context // SIZE)
        assert blocks[:used] == known[seq].blocks[:used]
    assert {t.dtype for t in (step.tokens, batch.positions, batch.slots)} == {torch.int64}
    assert {t.dtype for t in (batch.query_starts, batch.context_lens, batch.block_tables)} == {torch.int32}


def check_rows(step: StepInput, planned: Sequence[Work], known: dict[int, Known]) -> None:
    """Check the rows of logits: one before each drawn token, and those of prompts with log-probabilities."""
    works = in_step_order(planned)
    sampled, prompt_rows, prompts = list[int](), list[int](), list[PromptRows]()
    mask_rows: dict[int, list[int]] = {}
    first = 0
    for work in works:
        sequence = known[work.seq]
        if work.sample:
            rows = range(first + work.count - 1 - len(work.drafts), first + work.count)
            mask_rows[work.seq] = list(range(len(sampled), len(sampled) + len(rows)))
            sampled += rows
        if sequence.sampling.prompt_logprobs >= 0:
            positions = [p for p in range(work.start, work.start + work.count) if p + 1 < sequence.prompt_len]
            prompt_rows += [first + position - work.start for position in positions]
            if positions:
                targets = tuple(sequence.tokens[position + 1] for position in positions)
                prompts.append(PromptRows(work.seq, positions[0] + 1, targets, sequence.sampling.prompt_logprobs))
        first += work.count
    assert step.sampled == tuple(work for work in works if work.sample)
    assert step.prompts == tuple(prompts)
    if step.logit_rows is None:
        assert sampled + prompt_rows == list(range(first))
    else:
        assert step.logit_rows.dtype == torch.int64
        assert step.logit_rows.tolist() == sampled + prompt_rows
    assert list(step.masked_rows) == [row for work in planned if work.masked for row in mask_rows[work.seq]]


def check_sampling(step: StepInput, known: dict[int, Known]) -> None:
    if not step.sampled:
        assert step.sampling is None
        return
    assert step.sampling is not None
    rows = step.sampling
    each = [(known[work.seq], work.drafts[:i]) for work in step.sampled for i in range(1 + len(work.drafts))]
    wanted = [sequence.sampling for sequence, _ in each]
    assert rows.temperature.tolist() == [s.temperature for s in wanted]
    if step.plain and rows.greedy:  # these rows have no limits that anybody reads
        assert rows.logprobs == -1
        assert rows.edits is None
        return
    assert rows.top_k.tolist() == [s.top_k for s in wanted]
    assert rows.top_p.tolist() == [s.top_p for s in wanted]
    assert rows.min_p.tolist() == [s.min_p for s in wanted]
    assert rows.greedy == all(s.temperature == 0 for s in wanted)
    limited = [s.temperature > 0 and bool(s.top_k or s.top_p < 1 or s.min_p) for s in wanted]
    assert list(rows.truncated) == [i for i, truncated in enumerate(limited) if truncated]
    assert rows.logprobs == max(s.logprobs for s in wanted)
    if not rows.greedy:
        parts = [(s.sampling.seed, s.sampling.sample_index, len(s.tokens) + len(drafts)) for s, drafts in each]
        seeds, indices, positions = (np.array(column, np.uint64) for column in zip(*parts, strict=True))
        assert torch.equal(rows.keys, split_keys(row_keys(seeds, indices, positions)))
    builder = EditsBuilder()
    for row, (s, drafts) in enumerate(each):
        rules = SamplingRules.of(s.sampling, s.tokens[: s.prompt_len], s.tokens[s.prompt_len :])
        if rules is not None:
            builder.add(row, rules, drafts)
    assert flat(rows.edits) == flat(builder.build(len(each), CPU))


def flat(edits: Edits | None) -> list[list[float]] | None:
    if edits is None:
        return None
    parts = (edits.allowed, edits.forbidden, edits.bias, edits.penalties)
    tensors = [getattr(part, name) for part in parts if part is not None for name in type(part).__dataclass_fields__]
    assert all(isinstance(tensor, Tensor) for tensor in tensors)
    return [tensor.tolist() for tensor in tensors]


class Steps:
    """A random series of steps.

    Sequences are added, computed in chunks, decoded with drafts, and released. Later sequences reuse their rows. If
    `plain`, all draw one token in each step, without anything that would make a row special.
    """

    def __init__(self, data: st.DataObject, *, plain: bool) -> None:
        self.data = data
        self.plain = plain
        self.table = table(4)
        self.known: dict[int, Known] = {}
        self.free = list(range(1, 100))
        self.next_seq = 0

    def run(self) -> None:
        released = tuple(seq for seq in list(self.known) if self.data.draw(st.integers(0, 4)) == 0)
        for seq in released:
            self.free += self.known.pop(seq).blocks
        new = []
        while len(self.known) < 4 and (not self.known or self.data.draw(st.booleans())):
            new.append(self.admit())
        works = [work for seq in self.data.draw(st.permutations(list(self.known))) if (work := self.work(seq))]
        self.table.apply(plan(*works, new=tuple(new), released=released))
        assert len(self.table) == len(self.known)
        if works:
            step = self.table.build(works)
            drawing = [work for work in works if work.count == 1 and work.start >= self.known[work.seq].given]
            if self.plain:
                assert step.plain == (len(drawing) == len(works) and load_native()[0] is not None)
            check_batch(step, works, self.known)
            check_rows(step, works, self.known)
            check_sampling(step, self.known)
            for work in step.sampled:
                self.record(work)

    def admit(self) -> NewSeq:
        """Return a random new sequence. It may have output tokens, and all its tokens may be in cached blocks."""
        seq, self.next_seq = self.next_seq, self.next_seq + 1
        tokens = self.data.draw(st.lists(TOKENS | st.integers(0, 9), min_size=1, max_size=12))
        blocks = [self.free.pop(0) for _ in range(self.data.draw(st.integers(0, len(tokens) // SIZE)))]
        shared = len(blocks) * SIZE
        prompt_len = self.data.draw(st.integers(1, len(tokens)))
        sampling = self.data.draw(PLAIN_SAMPLINGS if self.plain else SAMPLINGS)
        masked = not self.plain and self.data.draw(st.booleans())
        done = min(shared, len(tokens) - 1)
        self.known[seq] = Known(tokens, prompt_len, blocks, shared, done, sampling, masked, len(tokens))
        return admit(seq, tokens, sampling, prompt_len=prompt_len, blocks=tuple(blocks))

    def work(self, seq: int) -> Work | None:
        sequence = self.known[seq]
        known = len(sequence.tokens)
        rest = known - sequence.done
        count = rest if self.plain else self.data.draw(st.sampled_from([rest, rest, None]))
        if count is None:
            count = self.data.draw(st.integers(0, rest))
        if count == 0 or known >= MAX_MODEL_LEN:
            return None
        sample = sequence.done + count == known
        most = min(3, MAX_MODEL_LEN - known - 1) if sample and not self.plain else 0
        sequence.drafts = self.data.draw(st.lists(TOKENS | st.integers(0, 9), max_size=most))
        stop = sequence.done + count + len(sequence.drafts)
        added = [self.free.pop(0) for _ in range(-(-stop // SIZE) - len(sequence.blocks))]
        sequence.blocks += added
        start, sequence.done = sequence.done, sequence.done + count
        masked = sample and sequence.masked
        return Work(seq, start, stop - start, sample, tuple(added), tuple(sequence.drafts), masked)

    def record(self, work: Work) -> None:
        sequence = self.known[work.seq]
        right = self.data.draw(st.integers(0, len(work.drafts)))
        tokens = [*work.drafts[:right], self.data.draw(TOKENS)]
        if self.plain:
            assert self.table.record_plain([work], tokens) == [0]
        else:
            self.table.record(work, tokens)
        sequence.tokens += tokens
        sequence.done = len(sequence.tokens) - 1
        sequence.drafts = []


@settings(steady, max_examples=80)
@given(data=st.data(), plain=st.booleans())
def test_a_random_series_of_steps_has_the_right_tensors(data: st.DataObject, plain: bool) -> None:
    steps = Steps(data, plain=plain)
    for _ in range(data.draw(st.integers(1, 6))):
        steps.run()


def test_a_step_uses_the_drawn_token_even_before_the_engine_has_it() -> None:
    under_test = table()
    first = Work(7, 0, 2, True, (4,))
    step_of(under_test, first, new=[admit(7, [10, 11])])
    under_test.record(first, [99])
    step = step_of(under_test, Work(7, 2, 1, True))
    assert step.tokens.tolist() == [99]
    assert step.batch.slots.tolist() == [4 * SIZE + 2]
    assert step.logit_rows is None


def test_drafts_follow_the_last_known_token() -> None:
    under_test = table()
    first = Work(7, 0, 2, True, (4,))
    step_of(under_test, first, new=[admit(7, [10, 11])])
    under_test.record(first, [99])
    second = Work(7, 2, 3, True, (5,), drafts=(50, 51))
    step = step_of(under_test, second)
    assert step.tokens.tolist() == [99, 50, 51]
    assert step.batch.num_single == 3, "attention computes drafts like single tokens"
    assert step.batch.context_lens.tolist() == [3, 4, 5]
    assert step.logit_rows is not None
    assert step.logit_rows.tolist() == [0, 1, 2]
    under_test.record(second, [50, 77])  # the first draft was accepted, and the second rejected
    assert step_of(under_test, Work(7, 4, 1, True)).tokens.tolist() == [77]


def test_rules_count_all_accepted_tokens() -> None:
    under_test = table()
    sampling = Sampling(seed=0, penalties=SamplingPenalties(1.0))
    first = Work(7, 0, 2, True, (4,), drafts=(5,))
    step_of(under_test, first, new=[admit(7, [6], sampling)])
    under_test.record(first, [5, 9])
    step = step_of(under_test, Work(7, 2, 1, True))
    assert step.sampling is not None
    assert step.sampling.edits is not None
    penalties = step.sampling.edits.penalties
    assert penalties is not None
    assert penalties.ids.tolist() == [6, 5, 9]
    assert penalties.counts.tolist() == [0, 1, 1]


def test_a_cached_token_that_is_computed_again_is_not_written_to_its_shared_block() -> None:
    under_test = table()
    tokens = [1, 2, 3, 4, 5, 6]
    step = step_of(under_test, Work(7, 5, 1, True), new=[admit(7, tokens, blocks=(8, 9))])
    assert step.batch.slots.tolist() == [SCRATCH]
    assert step.batch.block_tables.tolist() == [[8, 9]]
    under_test.record(Work(7, 5, 1, True), [7])
    assert step_of(under_test, Work(7, 6, 1, True, (3,))).batch.slots.tolist() == [3 * SIZE]


def test_only_tokens_in_shared_blocks_are_not_written() -> None:
    under_test = table()
    works = [Work(1, 2, 2, True, (5,)), Work(2, 0, 2, True, (6,))]
    step = step_of(under_test, *works, new=[admit(1, [1, 2, 3, 4], blocks=(8,)), admit(2, [1, 2])])
    assert step.batch.slots.tolist() == [SCRATCH, 5 * SIZE, 6 * SIZE, 6 * SIZE + 1]


def test_mask_rows_are_in_the_order_of_the_plan() -> None:
    """The order of a step differs: sequences with a single token come first."""
    under_test = table()
    works = [
        Work(1, 0, 3, True, (1,), drafts=(5,), masked=True),  # rows 2 and 3
        Work(2, 0, 1, True, (2,), masked=True),  # row 0
        Work(3, 0, 1, True, (3,)),  # row 1
        Work(4, 0, 2, True, (4,), masked=True),  # row 4
    ]
    step = step_of(under_test, *works, new=[admit(1, [1, 2]), admit(2, [1]), admit(3, [1]), admit(4, [1, 2])])
    assert [work.seq for work in step.sampled] == [2, 3, 1, 4]
    assert step.masked_rows == (2, 3, 0, 4)


def test_prompt_rows_of_chunks_are_complete() -> None:
    under_test = table()
    sampling = Sampling(seed=0, prompt_logprobs=1)
    first = step_of(under_test, Work(7, 0, 2, False, (4,)), new=[admit(7, [10, 11, 12, 13], sampling)])
    assert first.prompts == (PromptRows(7, 1, (11, 12), 1),)
    assert first.sampling is None
    assert first.logit_rows is not None
    assert first.logit_rows.tolist() == [0, 1]
    second = step_of(under_test, Work(7, 2, 2, True, (5,)))
    assert second.prompts == (PromptRows(7, 3, (13,), 1),)
    assert second.logit_rows is not None
    assert second.logit_rows.tolist() == [1, 0]


def test_a_resumed_sequence_has_its_output_tokens() -> None:
    under_test = table(1)
    under_test.apply(plan(new=(admit(7, [1, 2]),)))
    work = Work(7, 0, 3, True, (2,))
    under_test.apply(plan(work, new=(admit(7, [1, 2, 3], epoch=1, prompt_len=2),), released=(7,)))
    assert under_test.build([work]).tokens.tolist() == [1, 2, 3]
    assert under_test.epoch(7) == 1


def test_block_tables_are_padded_with_zeros_after_another_sequence() -> None:
    under_test = table(1)
    under_test.apply(plan(Work(1, 0, 9, True, (5, 6, 7)), new=(admit(1, [1] * 9),)))
    work = Work(2, 0, 7, True, (3, 4))
    under_test.apply(plan(work, new=(admit(2, [1] * 7),), released=(1,)))
    assert under_test.build([work]).batch.block_tables.tolist() == [[3, 4, 0]]


def test_too_many_sequences_are_an_error() -> None:
    under_test = table(1)
    with pytest.raises(IndexError):
        under_test.apply(plan(new=(admit(1, [1]), admit(2, [2]))))


def test_the_table_remembers_the_requested_number_of_logprobs() -> None:
    under_test = table()
    under_test.apply(plan(new=(admit(1, [1], Sampling(0, logprobs=3)), admit(2, [1]))))
    assert (under_test.logprobs(1), under_test.logprobs(2)) == (3, -1)


@pytest.mark.parametrize(
    ("sampling", "temperature", "top_p"),
    [
        (Sampling(0, temperature=1e-9), 0.0, 1.0),  # logits divided by this temperature would exceed float32
        (Sampling(0, temperature=1e300), float(np.float32(1e30)), 1.0),
        (Sampling(0, temperature=1.0, top_p=1e-300), 1.0, float(np.float32(1e-30))),
    ],
)
def test_parameters_outside_float32_are_limited(sampling: Sampling, temperature: float, top_p: float) -> None:
    step = step_of(table(), Work(1, 0, 1, True, (1,)), new=[admit(1, [1], sampling)])
    assert step.sampling is not None
    assert (step.sampling.temperature.item(), step.sampling.top_p.item()) == (temperature, top_p)


def test_a_draft_step_draws_plainly_with_the_keys_of_the_next_tokens() -> None:
    """A step of the draft model has one token for each of its sequences, at any position."""
    under_test = table()
    samplings = [
        Sampling(seed=i, temperature=1.0, top_k=3, logprobs=2, penalties=SamplingPenalties(1.0)) for i in range(3)
    ]
    new = [admit(i, [1, 2, 3, 4], samplings[i]) for i in range(3)]
    step_of(under_test, *(Work(i, 0, 4, True, (2 * i + 1, 2 * i + 2)) for i in range(3)), new=new)
    batch, rows = under_test.draft_step([2, 0], np.array([5, 6]))
    assert batch.positions.tolist() == [5, 6]
    assert batch.slots.tolist() == [6 * SIZE + 2, SCRATCH]  # two blocks have room for six tokens
    assert batch.context_lens.tolist() == [6, 7]
    assert (batch.num_single, batch.query_lens) == (2, (1, 1))
    keys = row_keys(np.array([2, 0], np.uint64), np.zeros(2, np.uint64), np.array([6, 7], np.uint64))
    assert torch.equal(rows.keys, split_keys(keys))
    assert rows.temperature.tolist() == [1.0, 1.0]
    assert (list(rows.truncated), rows.edits, rows.logprobs) == ([], None, -1)
