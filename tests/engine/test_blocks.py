"""The block pool, compared with a model that knows every block's content."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shoal.engine.blocks import BlockPool
from shoal.errors import EngineError
from support.fakes import steady

SIZE = 2


def filled(pool: BlockPool, tokens: list[int], salt: str | None = "") -> list[int]:
    """Return the blocks of a sequence that has computed all of `tokens`."""
    blocks = pool.allocate(-(-len(tokens) // pool.block_size))
    pool.cache(blocks, 0, len(tokens) // pool.block_size, tokens, salt)
    return blocks


def test_a_cached_prefix_is_found_up_to_the_whole_text() -> None:
    pool = BlockPool(8, SIZE)
    blocks = filled(pool, [1, 2, 3, 4, 5])
    assert pool.find_prefix([1, 2, 3, 4, 9], "") == blocks[:2]
    assert pool.find_prefix([1, 2, 3, 4], "") == blocks[:2]
    assert pool.find_prefix([1, 2], "") == blocks[:1]
    assert pool.find_prefix([1], "") == []
    assert pool.find_prefix([1, 9, 3, 4, 5], "") == []


def test_the_same_tokens_after_another_prefix_are_not_found() -> None:
    pool = BlockPool(8, SIZE)
    filled(pool, [1, 1, 5, 5])
    other = filled(pool, [2, 2, 5, 5])
    assert pool.find_prefix([2, 2, 5, 5, 0], "") == other
    assert pool.find_prefix([5, 5, 0], "") == []


def test_blocks_of_another_salt_are_not_found() -> None:
    pool = BlockPool(8, SIZE)
    filled(pool, [1, 2, 3, 4], "a")
    assert pool.find_prefix([1, 2, 3, 4, 5], "b") == []
    assert pool.find_prefix([1, 2, 3, 4, 5], "") == []
    assert len(pool.find_prefix([1, 2, 3, 4, 5], "a")) == 2


def test_blocks_without_a_salt_are_not_cached() -> None:
    pool = BlockPool(8, SIZE)
    filled(pool, [1, 2, 3, 4], None)
    assert pool.find_prefix([1, 2, 3, 4, 5], "") == []
    filled(pool, [1, 2, 3, 4], "")
    assert pool.find_prefix([1, 2, 3, 4, 5], None) == []


def test_the_longest_unused_block_is_allocated_first_and_of_a_sequence_the_last_one() -> None:
    pool = BlockPool(4, SIZE)
    old, young = filled(pool, [1, 1, 2, 2]), filled(pool, [3, 3, 4, 4])
    pool.release(old)
    pool.release(young)
    assert [pool.allocate(1)[0] for _ in range(4)] == [old[1], old[0], young[1], young[0]]


def test_blocks_without_content_are_allocated_before_cached_ones() -> None:
    pool = BlockPool(4, SIZE)
    cached, plain = filled(pool, [1, 1, 2, 2]), pool.allocate(2)
    pool.release(cached)
    pool.release(plain)
    assert set(pool.allocate(2)) == set(plain)
    assert pool.find_prefix([1, 1, 2, 2, 3], "") == cached


def test_a_held_block_stays_when_the_sequence_that_filled_it_ends() -> None:
    pool = BlockPool(3, SIZE)
    blocks = filled(pool, [1, 1, 2, 2])
    found = pool.find_prefix([1, 1, 2, 2, 3], "")
    assert pool.num_unused(found) == 0
    pool.take(found)
    pool.release(blocks)
    assert pool.num_free == 1
    pool.audit([found])
    pool.release(found)
    assert pool.num_unused(found) == 2
    pool.audit([])


def test_a_second_copy_of_a_block_is_not_cached_and_later_blocks_follow_the_first_copy() -> None:
    pool = BlockPool(8, SIZE)
    first = filled(pool, [1, 1])
    second = filled(pool, [1, 1, 2, 2])
    assert pool.find_prefix([1, 1, 2, 2, 3], "") == [first[0], second[1]]
    pool.release(second)
    assert pool.allocate(6)[0] == second[0], "a copy that is not cached is allocated first"


@pytest.mark.parametrize("held", [[], [[0, 1, 1]], [[0], [1], [2]]])
def test_the_audit_raises_if_the_counts_differ(held: list[list[int]]) -> None:
    pool = BlockPool(4, SIZE)
    assert pool.allocate(2) == [0, 1]
    with pytest.raises(EngineError, match="counted wrongly"):
        pool.audit(held)


class PoolMachine(RuleBasedStateMachine):
    """Sequences start, grow and end. The model knows which (salt, prefix) each block was filled with last."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6, SIZE)
        self.content: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.held: list[tuple[str, list[int], list[int]]] = []  # salt, tokens, blocks

    @rule(salt=st.sampled_from(["", "a"]), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=8))
    def admit(self, salt: str, tokens: list[int]) -> None:
        prefix = self.pool.find_prefix(tokens, salt)
        for i, block in enumerate(prefix):
            assert self.content[block] == (salt, tuple(tokens[: (i + 1) * SIZE]))
        assert len(prefix) * SIZE <= len(tokens)
        wanted = -(-len(tokens) // SIZE) - len(prefix)
        if wanted > self.pool.num_free - self.pool.num_unused(prefix):
            return
        self.pool.take(prefix)
        self.fill(salt, tokens, prefix, wanted, len(prefix))

    @precondition(lambda self: self.held and self.pool.num_free)
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), min_size=1, max_size=SIZE))
    def grow(self, data: st.DataObject, more: list[int]) -> None:
        salt, tokens, blocks = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        full = len(tokens) // SIZE
        tokens = tokens + more
        self.fill(salt, tokens, blocks, -(-len(tokens) // SIZE) - len(blocks), full)

    def fill(self, salt: str, tokens: list[int], blocks: list[int], count: int, cached: int) -> None:
        others = {block for *_, theirs in self.held for block in theirs} | set(blocks)
        new = self.pool.allocate(count)
        assert len(new) == len(set(new)) == count
        assert not others & set(new), "a block was given twice"
        blocks = blocks + new
        for i in range(len(tokens) // SIZE):
            self.content[blocks[i]] = (salt, tuple(tokens[: (i + 1) * SIZE]))
        for block in new[len(new) - (len(tokens) % SIZE > 0) :]:
            self.content.pop(block, None)
        self.pool.cache(blocks, cached, len(tokens) // SIZE, tokens, salt)
        self.held.append((salt, tokens, blocks))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        _, _, blocks = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.release(blocks)

    @invariant()
    def balanced(self) -> None:
        self.pool.audit(blocks for *_, blocks in self.held)
        assert self.pool.num_free == 6 - len({block for *_, blocks in self.held for block in blocks})


TestPool = PoolMachine.TestCase
TestPool.settings = settings(steady, max_examples=120, stateful_step_count=40)
