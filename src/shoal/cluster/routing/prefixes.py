"""An index of prefixes: which replicas are likely to have which beginnings of prompts in their prefix caches.

The index is a radix tree over the blocks of past prompts. A prompt is represented by a digest of 8 bytes per block, so
prompts are compared by comparing bytes. A node is a run of blocks that prompts have in common, with the replicas that
have these blocks. For each replica the index forgets the least recently used prompts first, and of a prompt the end
first, as the replica's own cache does.
"""

from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from shoal.errors import EngineError
from shoal.wire.tokens import TOKEN_DTYPE, num_tokens

WIDTH = 8  # bytes of a digest per block


class Digester:
    """A hash function for the blocks of prompts.

    It is multilinear hashing (Carter and Wegman, 1979) with random factors, so a client cannot construct prompts with
    the same digest. An accidental collision only sends a request to a replica that does not have its prefix.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._factors = np.random.default_rng().integers(0, 2**64, block_size, dtype=np.uint64) | np.uint64(1)

    def digest(self, tokens: bytes, salt: str) -> bytes:
        """Return the digest of the full blocks of a prompt. Prompts with different salts have no common prefix."""
        count = num_tokens(tokens) // self._block_size
        if not count:
            return b""
        ids = np.frombuffer(tokens, TOKEN_DTYPE, count * self._block_size).view(np.uint32)
        hashes = ids.reshape(count, self._block_size) @ self._factors
        if salt:
            hashes[0] ^= np.uint64(hash(salt) & (2**64 - 1))
        return bytes(hashes.data)


class Node:
    """A run of blocks that follows the blocks of its parent. A replica that has it has the parent too."""

    __slots__ = ("active", "children", "holders", "label", "parent")

    def __init__(self, label: bytes, parent: "Node | None") -> None:
        self.label = label
        self.parent = parent
        self.children: dict[bytes, Node] = {}  # by the first block of their labels
        self.holders: dict[int, int] = {}  # replica -> when it was last used there
        self.active = 0  # requests that replicas have and whose prompts begin with it

    @property
    def blocks(self) -> int:
        return len(self.label) // WIDTH


class PrefixIndex:
    """The index of prefixes. Replicas are denoted by their slots in the ledger."""

    def __init__(self) -> None:
        self._root = Node(b"", None)
        self._ends: dict[int, OrderedDict[Node, None]] = {}  # replica -> last nodes, the oldest first
        self._num_blocks: dict[int, int] = {}  # by replica
        self._now = 0

    def find(self, digest: bytes) -> list[tuple[Node, int]]:
        """Return the nodes of the longest known prefix of a prompt.

        Each comes with the number of its blocks that the prompt has. Only the last node may have more blocks than that.
        """
        found, node, at = [], self._root, 0
        while at < len(digest):
            child = node.children.get(digest[at : at + WIDTH])
            if child is None:
                break
            if not digest.startswith(child.label, at):
                found.append((child, _common_blocks(child.label, digest, at)))
                break
            found.append((child, child.blocks))
            node, at = child, at + len(child.label)
        return found

    def remember(self, replica: int, digest: bytes, capacity: int) -> Node | None:
        """Note that a replica computes a prompt. Return the last node of the prompt; None if it has no full block.

        Args:
            capacity: the number of blocks of all prompts that the replica remembers.
        """
        end = self._insert(digest[: capacity * WIDTH])
        if end is self._root:
            return None
        ends = self._ends.setdefault(replica, OrderedDict())
        num_blocks = self._num_blocks.get(replica, 0)
        self._now += 1
        node = end
        while node.parent is not None:
            if replica not in node.holders:
                num_blocks += node.blocks
            node.holders[replica] = self._now
            ends.pop(node, None)
            node = node.parent
        ends[end] = None
        self._num_blocks[replica] = num_blocks
        while self._num_blocks[replica] > capacity:
            self._forget_oldest(replica)
        return end

    def forget(self, replica: int) -> None:
        """Forget all blocks of a replica."""
        for end in self._ends.pop(replica, ()):
            node = end
            while node.parent is not None and replica in node.holders:
                self._drop(replica, node)
                node = node.parent
        self._num_blocks.pop(replica, None)

    def enter(self, end: Node | None) -> None:
        """Note that a replica gets a request whose prompt ends with this node."""
        while end is not None:
            end.active += 1
            end = end.parent

    def leave(self, end: Node | None) -> None:
        """Note that no replica has a request any more that was noted by `enter`."""
        while end is not None:
            end.active -= 1
            end = end.parent

    def num_blocks(self, replica: int) -> int:
        """Return how many blocks a replica is believed to have."""
        return self._num_blocks.get(replica, 0)

    def audit(self) -> None:
        """Compare the tree with the numbers of blocks that replicas have.

        Raises:
            EngineError: they differ.
        """
        num_blocks = dict.fromkeys(self._num_blocks, 0)
        nodes = [self._root]
        while nodes:
            node = nodes.pop()
            nodes += node.children.values()
            for first, child in node.children.items():
                inherited = node is self._root or all(
                    node.holders.get(replica, -1) >= used for replica, used in child.holders.items()
                )
                if child.parent is not node or child.label[:WIDTH] != first or not child.holders or not inherited:
                    raise EngineError(f"prefixes: a node of {child.blocks} blocks with {len(child.holders)} holders")
                for replica in child.holders:
                    num_blocks[replica] += child.blocks
        if num_blocks != self._num_blocks or self._ends.keys() != num_blocks.keys():
            raise EngineError(f"prefixes: replicas have {num_blocks} blocks, but {self._num_blocks} are noted")

    def _insert(self, digest: bytes) -> Node:
        node, at = self._root, 0
        for child, blocks in self.find(digest):
            node = child if blocks == child.blocks else self._split(child, blocks)
            at += len(node.label)
        if at == len(digest):
            return node
        end = Node(digest[at:], node)
        node.children[digest[at : at + WIDTH]] = end
        return end

    def _split(self, lower: Node, blocks: int) -> Node:
        """Split a node into two. Return the new node with the first `blocks`; the old one keeps the others."""
        assert lower.parent is not None
        cut = blocks * WIDTH
        upper = Node(lower.label[:cut], lower.parent)
        upper.holders, upper.active = dict(lower.holders), lower.active
        upper.parent.children[upper.label[:WIDTH]] = upper  # type: ignore[union-attr]
        lower.label, lower.parent = lower.label[cut:], upper
        upper.children[lower.label[:WIDTH]] = lower
        return upper

    def _forget_oldest(self, replica: int) -> None:
        ends = self._ends[replica]
        node, _ = ends.popitem(last=False)
        used = node.holders[replica]
        self._num_blocks[replica] -= node.blocks
        self._drop(replica, node)
        if node.parent is not None and node.parent.holders.get(replica) == used:  # now that prompt ends here
            ends[node.parent] = None
            ends.move_to_end(node.parent, last=False)

    def _drop(self, replica: int, node: Node) -> None:
        del node.holders[replica]
        if not node.holders and node.parent is not None:
            del node.parent.children[node.label[:WIDTH]]


def _common_blocks(label: bytes, digest: bytes, at: int) -> int:
    """Return how many blocks of a label the digest has at the offset `at`: at least the first one, but not all."""
    same, differ = 1, len(label) // WIDTH
    while differ - same > 1:
        middle = (same + differ) // 2
        if digest.startswith(label[: middle * WIDTH], at):
            same = middle
        else:
            differ = middle
    return same


def holders_of(node: Node) -> npt.NDArray[np.intp]:
    """Return the replicas that have a node, as an array: [holders]."""
    return np.fromiter(node.holders, np.intp, len(node.holders))
