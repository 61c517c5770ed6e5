"""Which replicas are likely to have which prefixes in their caches: a radix tree over the blocks of past prompts.

A prompt is known by a digest, 8 bytes a block, so that finding a prefix and where two prompts part is comparing bytes.
A node is a run of blocks that prompts share, with the replicas that have it. Each replica forgets what it has not seen
for longest, of a prompt its end first, as its own cache does.
"""

from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from shoal.errors import EngineError
from shoal.wire.tokens import TOKEN_DTYPE, num_tokens

WIDTH = 8  # bytes of a digest for a block


class Digester:
    """Multilinear hashing (Carter and Wegman, 1979) of each block, with random factors: what other prompts look alike
    can't be foreseen, and costs no more than a request at the wrong replica."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._factors = np.random.default_rng().integers(0, 2**64, block_size, dtype=np.uint64) | np.uint64(1)

    def digest(self, tokens: bytes, salt: str) -> bytes:
        """Return the digest of the whole blocks of a prompt; those of different salts have nothing in common."""
        count = num_tokens(tokens) // self._block_size
        if not count:
            return b""
        ids = np.frombuffer(tokens, TOKEN_DTYPE, count * self._block_size).view(np.uint32)
        hashes = ids.reshape(count, self._block_size) @ self._factors
        if salt:
            hashes[0] ^= np.uint64(hash(salt) & (2**64 - 1))
        return bytes(hashes.data)


class Node:
    """Blocks that follow those of its parent. Whoever holds it holds its parent."""

    __slots__ = ("active", "children", "holders", "label", "parent")

    def __init__(self, label: bytes, parent: "Node | None") -> None:
        self.label = label
        self.parent = parent
        self.children: dict[bytes, Node] = {}  # by the first block of their labels
        self.holders: dict[int, int] = {}  # replica -> when it was last used there
        self.active = 0  # requests at replicas that have begun with it

    @property
    def blocks(self) -> int:
        return len(self.label) // WIDTH


class PrefixIndex:
    """Replicas are small numbers."""

    def __init__(self) -> None:
        self._root = Node(b"", None)
        self._ends: dict[int, OrderedDict[Node, None]] = {}  # replica -> ends of prompts, the longest unused first
        self._held: dict[int, int] = {}  # replica -> blocks
        self._now = 0

    def find(self, digest: bytes) -> list[tuple[Node, int]]:
        """The nodes along a prompt and how many blocks of each are the prompt's; all of them but for the last."""
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
        """A replica gets a prompt, and keeps `capacity` blocks in all. Gives the node where it ends, None if it has no
        whole block."""
        end = self._insert(digest[: capacity * WIDTH])
        if end is self._root:
            return None
        ends = self._ends.setdefault(replica, OrderedDict())
        held = self._held.get(replica, 0)
        self._now += 1
        node = end
        while node.parent is not None:
            if replica not in node.holders:
                held += node.blocks
            node.holders[replica] = self._now
            ends.pop(node, None)
            node = node.parent
        ends[end] = None
        self._held[replica] = held
        while self._held[replica] > capacity:
            self._forget_oldest(replica)
        return end

    def forget(self, replica: int) -> None:
        """All that a replica had."""
        for end in self._ends.pop(replica, ()):
            node = end
            while node.parent is not None and replica in node.holders:
                self._drop(replica, node)
                node = node.parent
        self._held.pop(replica, None)

    def enter(self, end: Node | None) -> None:
        """Note that a request is at work whose prompt ends with this node."""
        while end is not None:
            end.active += 1
            end = end.parent

    def leave(self, end: Node | None) -> None:
        """Note that a request is at work no more whose prompt ends with this node."""
        while end is not None:
            end.active -= 1
            end = end.parent

    def held(self, replica: int) -> int:
        """Return how many blocks a replica is believed to have."""
        return self._held.get(replica, 0)

    def audit(self) -> None:
        """Hold the tree against the numbers of blocks that replicas have.

        Raises:
            EngineError: they differ.
        """
        held = dict.fromkeys(self._held, 0)
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
                    held[replica] += child.blocks
        if held != self._held or self._ends.keys() != held.keys():
            raise EngineError(f"prefixes: replicas have {held} blocks, not {self._held}")

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
        """A new node with the first blocks; the old one keeps the rest, and who ends there."""
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
        self._held[replica] -= node.blocks
        self._drop(replica, node)
        if node.parent is not None and node.parent.holders.get(replica) == used:  # it is the next end of that prompt
            ends[node.parent] = None
            ends.move_to_end(node.parent, last=False)

    def _drop(self, replica: int, node: Node) -> None:
        del node.holders[replica]
        if not node.holders and node.parent is not None:
            del node.parent.children[node.label[:WIDTH]]


def _common_blocks(label: bytes, digest: bytes, at: int) -> int:
    """Blocks in which a digest is, from `at` on, like a label. The first one is; the whole label is not."""
    same, differ = 1, len(label) // WIDTH
    while differ - same > 1:
        middle = (same + differ) // 2
        if digest.startswith(label[: middle * WIDTH], at):
            same = middle
        else:
            differ = middle
    return same


def slots(node: Node) -> npt.NDArray[np.intp]:
    """[holders]: the replicas that have a node."""
    return np.fromiter(node.holders, np.intp, len(node.holders))
