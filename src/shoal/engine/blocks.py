"""A pool of KV blocks: which are free, how many sequences hold each, and which can be found by a prefix.

A full block is found by a key: the identity of the block before it (for the first block of a sequence, the salt) and
the block's tokens. A lookup compares tokens and salt, block by block, so two prompts can't be confused. A block that no
sequence holds keeps its content until it is allocated again. The block that has been unused longest is allocated first;
of the blocks of one sequence, the last one.

Plans run in one total order on every rank. So a block is free as soon as a plan no longer needs it, and cached as
soon as the plan that fills it is made: every later plan runs after that one.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from shoal.errors import EngineError
from shoal.wire.base import Ids

Key = tuple[int | str, Ids]


class BlockPool:
    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._holders = [0] * num_blocks
        self._unused: OrderedDict[int, None] = OrderedDict.fromkeys(
            range(num_blocks)
        )  # the first one is allocated next
        self._cached: dict[Key, int] = {}
        self._keys: list[Key | None] = [None] * num_blocks
        self._identity = [0] * num_blocks  # a number for each block's cached content; no number is used twice
        self._next_identity = 1

    @property
    def num_free(self) -> int:
        """The number of blocks that no sequence holds, cached ones included."""
        return len(self._unused)

    def find_prefix(self, tokens: Sequence[int], salt: str | None) -> list[int]:
        """Return the blocks of the longest cached prefix, which may be all of the tokens. No block is taken.

        Only blocks that were cached with the same salt are found. A salt of None finds nothing.
        """
        found: list[int] = []
        if salt is None:
            return found
        size = self.block_size
        parent: int | str = salt
        for start in range(0, len(tokens) // size * size, size):
            block = self._cached.get((parent, tuple(tokens[start : start + size])))
            if block is None:
                break
            found.append(block)
            parent = self._identity[block]
        return found

    def num_unused(self, blocks: Iterable[int]) -> int:
        """Return how many of these blocks no sequence holds. Taking them lowers `num_free`."""
        return sum(self._holders[block] == 0 for block in blocks)

    def take(self, blocks: Iterable[int]) -> None:
        """Add a holder to each of these cached blocks."""
        for block in blocks:
            if self._holders[block] == 0:
                del self._unused[block]
            self._holders[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Return `count` free blocks to write to. The caller has checked `num_free`."""
        blocks = []
        for _ in range(count):
            block, _none = self._unused.popitem(last=False)
            self._forget(block)
            self._holders[block] = 1
            blocks.append(block)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Remove a holder from each block of a sequence. The blocks are in the order of the sequence."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._unused[block] = None
                if self._keys[block] is None:
                    self._unused.move_to_end(block, last=False)  # it has no cached content, so it is allocated first

    def cache(self, blocks: Sequence[int], first: int, last: int, tokens: Sequence[int], salt: str | None) -> None:
        """Make blocks `first` to `last` (exclusive) of a sequence findable. Their tokens must be final."""
        if salt is None:
            return
        size = self.block_size
        for i in range(first, last):
            parent: int | str = salt if i == 0 else self._identity[blocks[i - 1]]
            key = (parent, tuple(tokens[i * size : (i + 1) * size]))
            # Where the same content is cached already, the chain goes on from there; this copy stays private.
            owner = self._cached.setdefault(key, blocks[i])
            if owner == blocks[i]:
                self._keys[owner] = key
                self._identity[owner] = self._next_identity
                self._next_identity += 1
            else:
                self._identity[blocks[i]] = self._identity[owner]

    def forget_all(self) -> int:
        """Make all cached blocks unfindable, including blocks that are held, and return how many there were.

        Blocks that are cached later and follow a forgotten block are not found either, since a lookup reaches them only
        through the forgotten block.
        """
        count = len(self._cached)
        for block in self._cached.values():
            self._keys[block] = None
        self._cached.clear()
        return count

    def audit(self, held: Iterable[Sequence[int]]) -> None:
        """Compare the pool's counts with the blocks that each sequence holds.

        Raises:
            EngineError: they differ: a block was leaked or allocated twice.
        """
        holders = [0] * self.num_blocks
        for blocks in held:
            for block in blocks:
                holders[block] += 1
        wrong = [b for b in range(self.num_blocks) if holders[b] != self._holders[b]]
        wrong += [b for b in range(self.num_blocks) if (self._holders[b] == 0) != (b in self._unused)]
        wrong += [b for key, b in self._cached.items() if self._keys[b] != key]
        if wrong:
            raise EngineError(
                f"{len(set(wrong))} of {self.num_blocks} KV blocks are counted wrongly: {sorted(set(wrong))[:10]}"
            )

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        if key is not None:
            del self._cached[key]
            self._keys[block] = None
