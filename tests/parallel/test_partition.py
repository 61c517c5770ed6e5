"""Tests of the splits of dimensions and heads: for all sizes nothing is lost and nothing is doubled."""

from fractions import Fraction

from hypothesis import assume, given
from hypothesis import strategies as st

from shoal.parallel.partition import split, split_heads
from support.fakes import steady


@steady
@given(total=st.integers(0, 500), ranks=st.integers(1, 20), unit=st.integers(1, 40))
def test_shares_cover_everything_once_and_are_even(total: int, ranks: int, unit: int) -> None:
    shares = split(total, ranks, unit)
    assert len(shares) == ranks
    assert [i for share in shares for i in share] == list(range(total))
    assert all(share.start % unit == 0 for share in shares if share)
    units = [-(-len(share) // unit) for share in shares]
    assert max(units) - min(units) <= 1
    assert units == sorted(units, reverse=True), "the first are larger"
    ends = [share.stop for share in shares]
    assert all(share.start == stop for share, stop in zip(shares, [0, *ends], strict=False))


WEIGHTS = st.lists(st.integers(1, 20), min_size=1, max_size=20)


@steady
@given(total=st.integers(0, 500), weights=WEIGHTS, unit=st.integers(1, 40))
def test_unequal_shares_follow_the_weights(total: int, weights: list[int], unit: int) -> None:
    shares = split(total, len(weights), unit, weights)
    assert [i for share in shares for i in share] == list(range(total))
    assert all(share.start % unit == 0 for share in shares if share)
    units = -(-total // unit)
    for share, weight in zip(shares, weights, strict=True):
        assert abs(-(-len(share) // unit) - Fraction(units * weight, sum(weights))) < 1, "within one unit of its due"
    assert split(total, len(weights), unit, [7] * len(weights)) == split(total, len(weights), unit)


def test_examples_of_shares() -> None:
    assert split(16, 3, weights=(2, 1, 1)) == (range(8), range(8, 12), range(12, 16))
    assert split(10, 3, weights=(2, 1, 1)) == (range(5), range(5, 8), range(8, 10))
    assert split(10, 3, weights=(1, 1, 2)) == (range(3), range(3, 5), range(5, 10))
    assert split(3, 3, weights=(9, 1, 1)) == (range(3), range(3, 3), range(3, 3))
    assert split(10, 3) == (range(4), range(4, 7), range(7, 10))
    assert split(10, 3, 4) == (range(4), range(4, 8), range(8, 10))
    assert split(2, 3) == (range(1), range(1, 2), range(2, 2))


@steady
@given(kv_heads=st.integers(1, 16), group=st.integers(1, 9), ranks=st.integers(1, 24))
def test_every_query_head_reads_its_own_kv_head(kv_heads: int, group: int, ranks: int) -> None:
    q_heads = kv_heads * group
    shares = split_heads(q_heads, kv_heads, ranks)
    assert len(shares) == ranks
    assert [q for share in shares for q in share.q_range] == list(range(q_heads))
    for share in shares:
        assert len(share.q_to_kv) == len(share.q_range)
        wanted = [q // group for q in share.q_range]
        assert [share.kv_ids[i] for i in share.q_to_kv] == wanted
        assert list(share.kv_ids) == sorted(set(wanted)), "a KV head that nobody reads takes memory"
    fullest = max(len(share.q_range) for share in shares)
    assert fullest == -(-q_heads // ranks), "no rank has more than an even cut gives"


@steady
@given(kv_heads=st.integers(1, 16), group=st.integers(1, 9), ranks=st.integers(1, 16))
def test_kv_heads_are_not_copied_where_they_divide(kv_heads: int, group: int, ranks: int) -> None:
    assume(kv_heads % ranks == 0)
    shares = split_heads(kv_heads * group, kv_heads, ranks)
    assert [i for share in shares for i in share.kv_ids] == list(range(kv_heads))


@steady
@given(kv_heads=st.integers(1, 16), group=st.integers(1, 9), weights=WEIGHTS)
def test_unequal_heads(kv_heads: int, group: int, weights: list[int]) -> None:
    q_heads, ranks = kv_heads * group, len(weights)
    shares = split_heads(q_heads, kv_heads, ranks, weights)
    assert [q for share in shares for q in share.q_range] == list(range(q_heads))
    for share in shares:
        assert [share.kv_ids[i] for i in share.q_to_kv] == [q // group for q in share.q_range]
        assert list(share.kv_ids) == sorted({q // group for q in share.q_range})
    by_head = split(q_heads, ranks, weights=weights)
    load = [Fraction(len(share.q_range), weight) for share, weight in zip(shares, weights, strict=True)]
    assert max(load) <= max(Fraction(len(share), weight) for share, weight in zip(by_head, weights, strict=True))


def test_examples_of_heads() -> None:
    assert [len(s.q_range) for s in split_heads(8, 4, 3, (2, 1, 1))] == [4, 2, 2]
    assert [len(s.q_range) for s in split_heads(12, 2, 2, (2, 1))] == [8, 4]
    assert [s.q_to_kv for s in split_heads(8, 4, 2)] == [(0, 0, 1, 1), (0, 0, 1, 1)]
    middle = split_heads(6, 2, 3)[1]
    assert (middle.q_range, middle.kv_ids, middle.q_to_kv) == (range(2, 4), range(2), (0, 1))
    last = split_heads(2, 1, 4)[3]
    assert (len(last.q_range), len(last.kv_ids), last.q_to_kv) == (0, 0, ())
