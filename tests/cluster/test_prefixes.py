"""The index of prefixes against a model that remembers every block of every replica."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.cluster.routing.prefixes import WIDTH, Digester, PrefixIndex
from shoal.errors import EngineError
from shoal.wire.tokens import encode_tokens
from support.fakes import steady

PROMPTS = st.lists(st.integers(0, 1), max_size=6)


def digest(blocks: Sequence[int]) -> bytes:
    return b"".join(block.to_bytes(WIDTH, "big") for block in blocks)


def found(index: PrefixIndex, replica: int, blocks: Sequence[int]) -> int:
    return sum(count for node, count in index.find(digest(blocks)) if replica in node.holders)


def common(first: Sequence[int], second: Sequence[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


@given(steps=st.lists(st.tuples(st.integers(0, 2), PROMPTS), max_size=30), asked=PROMPTS)
@steady
def test_what_fits_is_found_block_by_block(steps: list[tuple[int, list[int]]], asked: list[int]) -> None:
    index = PrefixIndex()
    had: dict[int, list[list[int]]] = {0: [], 1: [], 2: []}
    for replica, prompt in steps:
        index.remember(replica, digest(prompt), 1000)
        had[replica].append(prompt)
        index.audit()
    for replica, prompts in had.items():
        assert found(index, replica, asked) == max((common(prompt, asked) for prompt in prompts), default=0)
    index.forget(1)
    index.audit()
    assert found(index, 1, asked) == 0
    assert found(index, 0, asked) == max((common(prompt, asked) for prompt in had[0]), default=0)


@given(steps=st.lists(st.tuples(st.integers(0, 2), PROMPTS), max_size=40), capacity=st.integers(1, 12))
@steady
def test_what_does_not_fit_is_forgotten_the_longest_unused_first(
    steps: list[tuple[int, list[int]]], capacity: int
) -> None:
    index = PrefixIndex()
    had: dict[int, list[list[int]]] = {0: [], 1: [], 2: []}
    for replica, prompt in steps:
        index.remember(replica, digest(prompt), capacity)
        index.audit()
        had[replica].append(prompt)
        assert found(index, replica, prompt) == min(len(prompt), capacity), "the latest one is there"
        recent: set[tuple[int, ...]] = set()  # blocks, each with what comes before it
        for earlier in reversed(had[replica]):
            recent |= {tuple(earlier[: i + 1]) for i in range(len(earlier))}
            if len(recent) > capacity:
                break
            assert found(index, replica, earlier) == len(earlier), "and all since which nothing was too much"
        assert index.held(replica) <= capacity
    for replica in had:
        index.forget(replica)
        assert index.held(replica) == 0
    index.audit()  # with no replica no block is left


def test_the_end_of_a_prompt_is_forgotten_before_its_beginning() -> None:
    index = PrefixIndex()
    index.remember(0, digest([1, 2, 3]), 6)
    index.remember(0, digest([1, 2, 4]), 6)
    index.remember(0, digest([7, 8, 9]), 6)
    assert [found(index, 0, [1, 2, last]) for last in (3, 4)] == [2, 3]
    index.remember(0, digest([7, 8, 5]), 6)
    assert [found(index, 0, [1, 2, last]) for last in (3, 4)] == [2, 2]


def test_the_audit_finds_what_is_wrong() -> None:
    index = PrefixIndex()
    index.remember(0, digest([1, 2]), 6)
    ((node, _),) = index.find(digest([1, 2]))
    node.holders.clear()
    with pytest.raises(EngineError, match="a node of 2 blocks with 0 holders"):
        index.audit()


@given(tokens=st.lists(st.integers(0, 2**31 - 1), max_size=20), other=st.integers(0, 2**31 - 1), at=st.integers(0, 19))
@steady
def test_a_digest_tells_blocks_apart(tokens: list[int], other: int, at: int) -> None:
    digester = Digester(4)
    one = digester.digest(encode_tokens(tokens), "")
    assert len(one) == len(tokens) // 4 * WIDTH
    assert digester.digest(encode_tokens([*tokens, 1]), "")[: len(one)] == one
    if one:
        assert digester.digest(encode_tokens(tokens), "salt")[:WIDTH] != one[:WIDTH]
    if at < len(tokens) // 4 * 4 and tokens[at] != other:
        changed = digester.digest(encode_tokens([*tokens[:at], other, *tokens[at + 1 :]]), "")
        assert [i for i in range(len(one) // WIDTH) if changed[i * WIDTH :][:WIDTH] != one[i * WIDTH :][:WIDTH]] == [
            at // 4
        ]
