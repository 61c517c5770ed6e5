"""Lengths, prompts and arrivals of a load test."""

import itertools
import math
import random
import statistics
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.client.load.prompts import WORDS, IdPrompts, WordPrompts
from shoal.client.load.tokens_per_word import words_by_usage
from shoal.client.load.workload import Lengths, Workload, arrivals, parse_mix
from shoal.errors import ConfigError
from support.fakes import steady

lengths = st.builds(Lengths, st.integers(1, 300), st.integers(1, 300), st.floats(0.01, 10))
workloads = st.builds(
    Workload,
    lengths=st.lists(lengths, min_size=1, max_size=4),
    range_ratio=st.floats(0, 0.99),
    shared_prefix_len=st.integers(0, 20),
    num_prefixes=st.integers(1, 5),
    prefix_zipf=st.floats(0, 3),
    seed=st.integers(0, 1000),
)


@steady
@given(workloads)
def test_lengths_are_in_their_ranges(workload: Workload) -> None:
    def fits(wanted: int, drawn: int) -> bool:
        ratio = workload.range_ratio
        return drawn >= 1 and math.floor(wanted * (1 - ratio)) <= drawn <= math.ceil(wanted * (1 + ratio))

    for drawn in itertools.islice(workload.sizes(), 50):
        assert any(fits(each.input_len, drawn[0]) and fits(each.output_len, drawn[1]) for each in workload.lengths)
        assert workload.shared_prefix_len + sum(drawn) <= workload.longest


@steady
@given(workloads, st.integers(0, 20))
def test_requests_follow_the_seed_and_the_arrivals(workload: Workload, count: int) -> None:
    prompts = IdPrompts(1000)
    times = [float(number) for number in range(count)]
    requests = list(workload.requests(prompts, iter(times)))
    assert requests == list(workload.requests(prompts, iter(times)))
    assert [each.arrival for each in requests] == times
    assert [each.index for each in requests] == list(range(count))
    assert all(len(each.prompt) == each.prompt_tokens for each in requests)
    assert [(each.prompt_tokens - workload.shared_prefix_len, each.max_tokens) for each in requests] == list(
        itertools.islice(workload.sizes(), count)
    )
    begins = {str(each.prompt[: workload.shared_prefix_len]) for each in requests}
    assert len(begins) <= workload.num_prefixes


def test_the_rate_does_not_change_prompts() -> None:
    workload = Workload(lengths=[Lengths(8, 4)], range_ratio=0.5)
    slow, fast = (
        list(itertools.islice(workload.requests(IdPrompts(99), arrivals(rate, 1.0, 0)), 5)) for rate in (1.0, 9.0)
    )
    assert [each.prompt for each in slow] == [each.prompt for each in fast]
    assert [each.arrival for each in slow] != [each.arrival for each in fast]


def test_shares_of_a_mix() -> None:
    drawn = Counter(itertools.islice(Workload(lengths=parse_mix("10:1@3,20:2@1")).sizes(), 4000))
    assert set(drawn) == {(10, 1), (20, 2)}
    assert abs(drawn[10, 1] / 4000 - 0.75) < 0.03  # four standard deviations


def test_shares_of_prefixes() -> None:
    """With an exponent of 1 the share of the first of three prefixes is 6/11."""
    workload = Workload(lengths=[Lengths(1, 1)], shared_prefix_len=4, num_prefixes=3)
    drawn = Counter(itertools.islice(workload.prefixes(), 4000))
    assert abs(drawn[0] / 4000 - 6 / 11) < 0.032
    assert drawn[0] > drawn[1] > drawn[2] > 0


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_between_arrivals(burstiness: float) -> None:
    times = list(itertools.islice(arrivals(20.0, burstiness, seed=3), 20_000))
    gaps = [after - before for before, after in itertools.pairwise([0.0, *times])]
    assert min(gaps) >= 0
    mean = statistics.fmean(gaps)
    assert mean == pytest.approx(1 / 20, rel=0.06)
    assert statistics.stdev(gaps) / mean == pytest.approx(1 / math.sqrt(burstiness), rel=0.06)


def test_an_infinite_rate_sends_all_at_once() -> None:
    assert list(itertools.islice(arrivals(math.inf, 1.0, 0), 3)) == [0.0, 0.0, 0.0]


@steady
@given(st.lists(lengths, min_size=1, max_size=5))
def test_a_mix_is_parsed(mix: list[Lengths]) -> None:
    text = ", ".join(f"{each.input_len}:{each.output_len}@{each.weight!r}" for each in mix)
    assert parse_mix(text) == tuple(mix)
    assert parse_mix("3:4") == (Lengths(3, 4),)


@pytest.mark.parametrize("text", ["", "5", "1:2:3", "a:b", "1:2@x", "1:2,", "0:2", "1:2@0", "1:2@-1", "1:2@inf"])
def test_wrong_mixes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_mix(text)
    assert "\n" not in str(raised.value)


@steady
@given(
    st.dictionaries(st.sampled_from(WORDS), st.integers(1, 6), min_size=1, max_size=20),
    st.integers(0, 3),
    st.integers(1, 200),
    st.integers(0, 99),
)
def test_texts_have_the_given_number_of_tokens(costs: dict[str, int], overhead: int, tokens: int, seed: int) -> None:
    """A text has at least one word, and ends when no other word fits."""
    prompts = WordPrompts(costs, {word: cost + overhead for word, cost in costs.items()})
    for behind in (False, True):
        words = str(prompts.make(tokens, random.Random(seed), joined=behind)).split(" ")
        total = sum(costs[word] for word in words) + (0 if behind else overhead)
        assert total <= tokens or (len(words) == 1 and costs[words[0]] == min(costs.values()))
        assert total > tokens - min(costs.values())


def test_ids_are_in_the_vocabulary() -> None:
    for size in (2, 5, 300):
        assert set(IdPrompts(size).make(5000, random.Random(0))) <= set(range(min(4, size - 1), size))


def test_a_chat_template_does_not_count_in_the_cost_of_words() -> None:
    """With a template of 36 tokens and words of one token, prompts are as long as without a template."""
    around, each = 36, len(WORDS)
    found = words_by_usage(around + each, around + 2 * each)
    assert found.make(100, random.Random(0)) == words_by_usage(each, 2 * each).make(100, random.Random(0))
