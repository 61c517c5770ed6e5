"""The index of prefixes, compared with a model that remembers every block of every replica."""

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
def test_all_blocks_are_found_while_they_fit(steps: list[tuple[int, list[int]]], asked: list[int]) -> None:
    index = PrefixIndex()
    computed: dict[int, list[list[int]]] = {0: [], 1: [], 2: []}
    for replica, prompt in steps:
        index.remember(replica, digest(prompt), 1000)
        computed[replica].append(prompt)
        index.audit()
    for replica, prompts in computed.items():
        assert found(index, replica, asked) == max((common(prompt, asked) for prompt in prompts), default=0)
    index.forget(1)
    index.audit()
    assert found(index, 1, asked) == 0
    assert found(index, 0, asked) == max((common(prompt, asked) for prompt in computed[0]), default=0)


@given(steps=st.lists(st.tuples(st.integers(0, 2), PROMPTS), max_size=40), capacity=st.integers(1, 12))
@steady
def test_the_least_recently_used_blocks_are_forgotten_first(steps: list[tuple[int, list[int]]], capacity: int) -> None:
    index = PrefixIndex()
    computed: dict[int, list[list[int]]] = {0: [], 1: [], 2: []}
    for replica, prompt in steps:
        index.remember(replica, digest(prompt), capacity)
        index.audit()
        computed[replica].append(prompt)
        assert found(index, replica, prompt) == min(len(prompt), capacity), "the latest prompt is found"
        recent: set[tuple[int, ...]] = set()  # blocks, each with the blocks before it
        for earlier in reversed(computed[replica]):
            recent |= {tuple(earlier[: i + 1]) for i in range(len(earlier))}
            if len(recent) > capacity:
                break
            assert found(index, replica, earlier) == len(earlier), "so are earlier prompts as long as all fit"
        assert index.num_blocks(replica) <= capacity
    for replica in computed:
        index.forget(replica)
        assert index.num_blocks(replica) == 0
    index.audit()  # the audit fails if a node has no holder


def test_the_end_of_a_prompt_is_forgotten_before_its_beginning() -> None:
    index = PrefixIndex()
    index.remember(0, digest([1, 2, 3]), 6)
    index.remember(0, digest([1, 2, 4]), 6)
    index.remember(0, digest([7, 8, 9]), 6)
    assert [found(index, 0, [1, 2, last]) for last in (3, 4)] == [2, 3]
    index.remember(0, digest([7, 8, 5]), 6)
    assert [found(index, 0, [1, 2, last]) for last in (3, 4)] == [2, 2]


def test_the_audit_finds_an_inconsistent_node() -> None:
    index = PrefixIndex()
    index.remember(0, digest([1, 2]), 6)
    ((node, _),) = index.find(digest([1, 2]))
    node.holders.clear()
    with pytest.raises(EngineError, match="a node of 2 blocks with 0 holders"):
        index.audit()


@given(tokens=st.lists(st.integers(0, 2**31 - 1), max_size=20), other=st.integers(0, 2**31 - 1), at=st.integers(0, 19))
@steady
def test_different_blocks_have_different_digests(tokens: list[int], other: int, at: int) -> None:
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
