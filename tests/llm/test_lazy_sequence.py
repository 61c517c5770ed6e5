"""Sequences whose items are made when they are read."""

import pytest

from shoal.llm.lazy_sequence import LazySequence


def test_a_lazy_sequence_can_be_indexed_sliced_and_iterated() -> None:
    found = LazySequence(4, lambda place: place * 10)
    assert (len(found), list(found), found[1], found[-1]) == (4, [0, 10, 20, 30], 10, 30)
    assert (found[1:3], found[::-1], found[5:]) == ((10, 20), (30, 20, 10, 0), ())
    assert 20 in found
    for place in (4, -5):
        with pytest.raises(IndexError):
            found[place]


def test_an_item_is_made_only_when_it_is_read() -> None:
    made: list[int] = []
    found = LazySequence(1000, made.append)
    assert len(found[10:12]) == 2
    assert made == [10, 11]
