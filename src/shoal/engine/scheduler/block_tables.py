"""The KV blocks that running requests hold."""

from collections.abc import Iterable

from shoal.engine.blocks import BlockPool
from shoal.engine.request import Request
from shoal.engine.scheduler.limits import SchedulerLimits
from shoal.wire.engine import ResetOutcome


class BlockTables:
    """Block tables of running requests, taken from one pool.

    A table is opened when its request starts to run and closed when it stops. In between it grows with the planned
    tokens; blocks that no attention window reaches any more are released.
    """

    def __init__(self, pool: BlockPool, limits: SchedulerLimits) -> None:
        self._pool = pool
        self.block_size = self._size = pool.block_size
        self._window = limits.window
        self._max_model_len = limits.max_model_len
        self._num_open = 0

    @property
    def has_window(self) -> bool:
        """Return whether `retire` may release blocks."""
        return self._window is not None

    @property
    def free_tokens(self) -> int:
        """The number of tokens for which there are free blocks."""
        return self._pool.num_free * self._size

    def find_prefix(self, request: Request) -> list[int]:
        """Return the cached blocks that the request may start from. No block is taken."""
        return self._pool.find_prefix(request.tokens, request.salt) if request.may_reuse_blocks else []

    def tokens_in(self, prefix: list[int]) -> int:
        return len(prefix) * self._size

    def fits(self, request: Request, prefix: list[int]) -> bool:
        """Return whether all known tokens of the request have room, if it starts from the prefix."""
        wanted = -(-len(request.tokens) // self._size) - len(prefix)
        return wanted <= self._pool.num_free - self._pool.num_unused(prefix)

    def open(self, request: Request, prefix: list[int]) -> None:
        self._pool.take(prefix)
        self._num_open += 1
        request.blocks = prefix
        request.blocks_cached = len(prefix)

    def close(self, request: Request) -> None:
        self._pool.release(request.held_blocks)
        self._num_open -= 1
        request.blocks = []
        request.blocks_retired = 0
        request.blocks_cached = 0

    def room(self, request: Request) -> int:
        """Return how many more tokens fit into the request's blocks and the free ones."""
        return (len(request.blocks) + self._pool.num_free) * self._size - request.computed

    def room_for_drafts(self, request: Request) -> int:
        """Return how many more tokens fit if no other request may be preempted for a draft."""
        return (len(request.blocks) + self._spare) * self._size - request.computed

    def extend(self, request: Request, lookahead: int) -> list[int]:
        """Add blocks for all planned tokens, and for `lookahead` more if there are spare blocks.

        The caller has checked `room`.
        """
        held = len(request.blocks)
        wanted = -(-request.computed // self._size) - held
        if lookahead:
            end = min(request.computed + lookahead, self._max_model_len)
            wanted = max(wanted, min(-(-end // self._size) - held, self._spare))
        if wanted <= 0:
            return []
        added = self._pool.allocate(wanted)
        request.blocks += added
        return added

    def retire(self, request: Request) -> None:
        """Release blocks that no layer will look at again.

        The last block that the prefix cache knows stays, since the next one is found through it.
        """
        if self._window is None:
            return
        computed = request.computed - request.num_drafts  # drafts that prove wrong are computed again
        first_seen = max(computed - self._window + 1, 0)
        retired = min(first_seen // self._size, request.blocks_cached - 1)
        if retired > request.blocks_retired:
            self._pool.release(request.blocks[request.blocks_retired : retired])
            request.blocks_retired = retired

    def cache(self, request: Request) -> None:
        """Put the blocks whose tokens are known and computed into the prefix cache."""
        final = min(request.computed, len(request.tokens))
        if final < (request.blocks_cached + 1) * self._size:
            return
        full = final // self._size
        if request.blocks:
            self._pool.cache(request.blocks, request.blocks_cached, full, request.tokens, request.salt)
            request.blocks_cached = full

    def forget_prefixes(self) -> ResetOutcome:
        """Empty the prefix cache. Block tables stay as they are."""
        return ResetOutcome(self._pool.forget_all(), self._pool.num_blocks - self._pool.num_free)

    def audit(self, running: Iterable[Request]) -> None:
        """Compare the pool's counts with the tables of the running requests.

        Raises:
            EngineError: they differ.
        """
        self._pool.audit(request.held_blocks for request in running)

    @property
    def _spare(self) -> int:
        """The number of free blocks beyond one for each running request."""
        return max(self._pool.num_free - self._num_open, 0)
