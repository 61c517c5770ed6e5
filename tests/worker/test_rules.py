"""Sampling rules and histories, compared with counts over the whole text."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.wire.base import Ids
from shoal.wire.ranks import Sampling, SamplingPenalties
from shoal.wire.tokens import decode_tokens, encode_numbers, encode_tokens
from shoal.worker.sampling_rules import EditsBuilder, History, SamplingRules
from support.fakes import steady

CPU = torch.device("cpu")
FEW = st.integers(0, 6)  # few tokens, so that they are repeated
TEXT = st.lists(FEW, max_size=12)
PLAIN = Sampling(seed=0)
PENALTIES = SamplingPenalties(0.5, 0.25, 2.0)


def recount(prompt: Sequence[int], output: Sequence[int]) -> dict[int, int]:
    """Return how many times the output has each token of prompt and output."""
    return {token: Counter(output)[token] for token in [*prompt, *output]}


def counted(history: History, drafts: Sequence[int] = ()) -> dict[int, int]:
    ids, counts = history.after(drafts)
    assert len(ids) == len(counts)
    assert len(set(ids.tolist())) == len(ids), "no token appears twice"
    assert (str(ids.dtype), str(counts.dtype)) == ("int64", "int32")
    return dict(zip(ids.tolist(), counts.tolist(), strict=True))


@steady
@given(prompt=TEXT, before=TEXT, after=TEXT, drafts=TEXT)
def test_a_history_has_the_same_counts_as_a_recount(
    prompt: list[int], before: list[int], after: list[int], drafts: list[int]
) -> None:
    history = History(prompt, before)
    assert counted(history) == recount(prompt, before)
    for i, token in enumerate(after):
        assert counted(history, drafts) == recount(prompt, [*before, *after[:i], *drafts])
        history.append(token)
    assert counted(history) == recount(prompt, before + after)


def test_a_history_grows_without_losing_counts() -> None:
    """The history has more tokens than its first arrays."""
    prompt = list(range(0, 30, 3))
    history = History(prompt, [])
    output = [*range(500), *range(0, 500, 7), 3, 3]
    for token in output:
        history.append(token)
    assert counted(history) == recount(prompt, output)


def test_drafts_do_not_change_a_history() -> None:
    history = History([1], [2, 2])
    assert counted(history, [2, 9, 9, 1]) == {1: 1, 2: 3, 9: 2}
    assert counted(history) == {1: 0, 2: 2}


def forbidden(sampling: Sampling, output: Sequence[int]) -> set[int]:
    """Return the tokens that must not come next, by a plain search."""
    found = set(decode_tokens(sampling.ends)) if len(output) < sampling.min_tokens else set()
    for run in sampling.banned:
        beginning = run[:-1]
        if tuple(output[len(output) - len(beginning) :]) == beginning and len(output) >= len(beginning):
            found.add(run[-1])
    return found


RULES = st.builds(
    Sampling,
    seed=st.just(0),
    min_tokens=st.integers(0, 6),
    ends=st.just(encode_tokens([20, 21])),
    banned=st.lists(st.lists(FEW, min_size=1, max_size=4).map(tuple), max_size=4).map(tuple),
    penalties=st.sampled_from([None, PENALTIES]),
)


@steady
@given(sampling=RULES, prompt=TEXT, before=TEXT, after=TEXT, drafts=TEXT)
def test_forbidden_tokens_are_those_of_a_plain_search(
    sampling: Sampling, prompt: list[int], before: list[int], after: list[int], drafts: list[int]
) -> None:
    """Banned runs of tokens count only in the output, so no run begins in the prompt."""
    rules = SamplingRules(sampling, prompt, before)
    for i, token in enumerate([*after, 0]):
        output = before + after[:i]
        for count in range(len(drafts) + 1):
            assert set(rules.forbidden(drafts[:count])) == forbidden(sampling, output + drafts[:count])
        rules.append(token)


def test_end_tokens_are_forbidden_before_min_tokens_and_drafts_count() -> None:
    rules = SamplingRules(Sampling(seed=0, min_tokens=3, ends=encode_tokens([8, 9])), [1, 1, 1, 1], [5])
    assert [rules.forbidden([5] * count).tolist() for count in range(4)] == [[8, 9], [8, 9], [], []]


@pytest.mark.parametrize(
    ("output", "drafts", "expected"),
    [
        ([], [], [4]),
        ([1], [], [4]),
        ([1, 2], [], [3, 4]),
        ([1], [2], [3, 4]),
        ([], [1, 2], [3, 4]),
        ([1, 2], [0], [4]),
        ([0, 1, 2], [], [3, 4]),
    ],
)
def test_the_last_token_of_a_banned_run_is_forbidden(output: list[int], drafts: list[int], expected: list[int]) -> None:
    rules = SamplingRules(Sampling(seed=0, banned=((1, 2, 3), (4,))), [1, 2], output)
    assert sorted(rules.forbidden(drafts)) == expected


class CountingTuple(tuple[Ids, ...]):
    """A tuple that counts how often it is iterated over."""

    walks = 0

    def __iter__(self) -> Iterator[Ids]:
        self.walks += 1
        return super().__iter__()


def test_a_step_does_not_iterate_over_all_banned_runs() -> None:
    """It does not make the array of always forbidden tokens again either."""
    banned = CountingTuple([*((token,) for token in range(100)), *((token, 0, 7) for token in range(100, 600))])
    rules = SamplingRules(Sampling(seed=0, banned=banned), [1], [5])
    walks = banned.walks
    found = [rules.forbidden([5] * count) for count in range(50)]
    assert banned.walks == walks
    assert all(each is found[0] for each in found)
    assert found[0].tolist() == list(range(100))
    assert rules.forbidden([100, 0]).tolist() == [*range(100), 7]


def test_banned_runs_with_the_same_last_tokens_are_distinguished() -> None:
    rules = SamplingRules(Sampling(seed=0, banned=((2, 3), (1, 2, 4), (0, 1, 2, 5), (1, 6), (2, 2, 7))), [1, 2], [])
    texts = [[], [2], [1, 2], [0, 1, 2], [1, 1, 2], [2, 2]]
    assert [rules.forbidden(text).tolist() for text in texts] == [[], [3], [3, 4], [3, 4, 5], [3, 4], [3, 7]]


@pytest.mark.parametrize(
    ("sampling", "some"),
    [
        (PLAIN, False),
        (Sampling(seed=1, temperature=1.0, top_k=3, top_p=0.5, min_p=0.1, logprobs=3), False),
        (Sampling(seed=0, ends=encode_tokens([3])), False),
        (Sampling(seed=0, min_tokens=1), True),
        (Sampling(seed=0, bias_ids=encode_tokens([1]), bias_values=encode_numbers([2.0])), True),
        (Sampling(seed=0, allowed=encode_tokens([1])), True),
        (Sampling(seed=0, banned=((1,),)), True),
        (Sampling(seed=0, penalties=PENALTIES), True),
    ],
)
def test_only_parameters_that_change_logits_make_rules(sampling: Sampling, some: bool) -> None:
    assert (SamplingRules.of(sampling, [1], []) is not None) == some


def test_edits_of_several_rows_are_pairs_of_row_and_id() -> None:
    everything = Sampling(
        seed=0,
        min_tokens=9,
        ends=encode_tokens([20, 21]),
        bias_ids=encode_tokens([3, 4]),
        bias_values=encode_numbers([1.5, -2.0]),
        allowed=encode_tokens([5, 6, 40]),
        penalties=PENALTIES,
    )
    a = SamplingRules(everything, [1, 2], [2])
    half: dict[str, Any] = {
        "bias_ids": encode_tokens([8]),
        "bias_values": encode_numbers([0.5]),
        "allowed": encode_tokens([31]),
    }
    b = SamplingRules(Sampling(seed=0, penalties=SamplingPenalties(1.0, 0.0, 1.0), **half), [4], [])
    builder = EditsBuilder()
    builder.add(1, a, [])
    builder.add(2, a, [2])
    builder.add(4, b, [])
    edits = builder.build(5, CPU)
    assert edits is not None
    assert edits.masks is None
    assert edits.allowed is not None
    assert edits.allowed.rows.tolist() == [1, 2, 4]
    assert edits.allowed.bits.tolist() == [[0b1100000, 1 << 8], [0b1100000, 1 << 8], [-(1 << 31), 0]]
    assert edits.forbidden is not None
    assert pairs(edits.forbidden) == [(1, 20), (1, 21), (2, 20), (2, 21)]
    assert edits.bias is not None
    assert pairs(edits.bias) == [(1, 3), (1, 4), (2, 3), (2, 4), (4, 8)]
    assert edits.bias.values.tolist() == [1.5, -2.0, 1.5, -2.0, 0.5]
    assert edits.penalties is not None
    assert pairs(edits.penalties) == [(1, 1), (1, 2), (2, 1), (2, 2), (4, 4)]
    assert edits.penalties.counts.tolist() == [0, 1, 0, 2, 0]
    assert edits.penalties.presence.tolist() == [0.0, 0.5, 0.5, 0.0, 1.0]
    assert edits.penalties.frequency.tolist() == [0.0, 0.25, 0.25, 0.0, 0.0]
    assert edits.penalties.repetition.tolist() == [1.0, 2.0, 2.0, 1.0, 1.0]  # rows without penalty have the factor 1


def pairs(part: object) -> list[tuple[int, int]]:
    rows, ids = getattr(part, "rows"), getattr(part, "ids")  # noqa: B009 (several classes have these fields)
    assert rows.dtype == ids.dtype == torch.int64
    return list(zip(rows.tolist(), ids.tolist(), strict=True))


def test_built_edits_do_not_change_with_the_history() -> None:
    rules = SamplingRules(Sampling(seed=0, penalties=PENALTIES), [1], [2])
    builder = EditsBuilder()
    builder.add(0, rules, [])
    edits = builder.build(1, CPU)
    rules.append(2)
    assert edits is not None
    assert edits.penalties is not None
    assert edits.penalties.counts.tolist() == [0, 1]


def test_rows_without_changes_make_no_edits() -> None:
    builder = EditsBuilder()
    assert builder.build(3, CPU) is None
    builder.add(0, SamplingRules(Sampling(seed=0, banned=((1, 2),), min_tokens=1), [], [5]), [])
    assert builder.build(3, CPU) is None


@pytest.mark.parametrize("repetition", [1e-300, 1e300])
def test_repetition_penalties_are_limited_to_float32(repetition: float) -> None:
    builder = EditsBuilder()
    builder.add(0, SamplingRules(Sampling(seed=0, penalties=SamplingPenalties(repetition=repetition)), [1], []), [])
    edits = builder.build(1, CPU)
    assert edits is not None
    assert edits.penalties is not None
    assert edits.penalties.repetition.item() == pytest.approx(1e30 if repetition > 1 else 1e-30)
