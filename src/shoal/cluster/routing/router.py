"""The router, which decides to which replica a request goes, by the work of replicas and by their prefix caches.

Requests wait in the router and not at replicas. A replica has no more requests than keep it busy, so a request that is
assigned late goes to the replica that has been faster, and all end at about the same time. Requests are assigned by
priority and arrival. A request that only one replica may run waits while that replica is full or away, but the requests
after it do not wait for it.

**The rule.** A request goes to the replica that would have the least work left once it has the request. Work is counted
in tokens: prompt tokens to compute, output tokens that are expected, and the tokens of the request itself that are not
in the replica's prefix cache. This is minimum completion time on unrelated machines (Ibarra and Kim, "Heuristic
algorithms for scheduling independent tasks on nonidentical processors", 1977). If tasks are faster where their data is,
this rule keeps queues bounded whenever any rule does (Xie, Yekkehkhany and Lu, "Scheduling with multi-level data
locality: throughput and heavy-traffic optimality", 2016). So a request goes to a replica that has its prefix unless
another replica has so much less work that computing the prefix again is faster. That replica has the prefix from then
on. So the number of copies of a prefix follows its share of the traffic, and each copy is computed once.

The lengths of outputs are estimates, and replicas with popular prefixes always have a little more work. Both errors add
up over time. So the tokens that a replica has computed beyond the mean are counted too, like the integral term of a
controller, but only up to the mean of the work left and up to half of the request's own tokens. If no replica is busy,
there is nothing to balance; and a replica that has done less because it is slow does not have to catch up.

**Idle replicas.** With little traffic, the replica that has a popular prefix is never busy enough to give a request
away. So there is a second rule: while a prefix has no more copies than requests in progress, a request with that prefix
goes to an idle replica if there is one. A prefix that one request at a time uses, such as a conversation, stays at its
replica.
"""

from collections.abc import Mapping

import numpy as np

from shoal.cluster.routing.capacity import ReplicaCapacity
from shoal.cluster.routing.ledger import FULL, HeldRequest, RequestLedger, Work
from shoal.cluster.routing.output_lengths import OutputLengths
from shoal.cluster.routing.prefixes import Digester, Node, PrefixIndex, holders_of
from shoal.cluster.routing.waiting_queues import WaitingQueues
from shoal.errors import EngineError
from shoal.wire.engine import EngineRequest


class RequestRouter:
    """A queue of requests that decides which request goes to which replica next.

    Replicas are denoted by numbers, and may come and go. `ledger` has the requests of each replica. A decision costs a
    few operations on arrays with an element for each replica, and a walk along the nodes of the prompt's known prefix.
    """

    def __init__(self, capacities: Mapping[int, ReplicaCapacity] | None = None) -> None:
        self.ledger = RequestLedger()
        self._queues = WaitingQueues()
        self._last_slot = -1  # the slot that was chosen last
        self._lengths = OutputLengths()
        self._prefixes = PrefixIndex()
        self._digester: Digester | None = None
        self._block_size = 1
        for number, capacity in (capacities or {}).items():
            self.admit(number, capacity)

    # --- replicas ------------------------------------------------------------------------------------------------

    def admit(self, number: int, capacity: ReplicaCapacity) -> None:
        """Add a replica, whose prefix cache is empty.

        Raises:
            ValueError: the router has it already, or its block size differs from that of the others.
        """
        if self.ledger.has(number):
            raise ValueError(f"the router has replica {number} already")
        if self._digester is None and capacity.prefix_blocks:
            self._digester, self._block_size = Digester(capacity.block_size), capacity.block_size
        if capacity.prefix_blocks and capacity.block_size != self._block_size:
            raise ValueError(
                f"replica {number} has blocks of {capacity.block_size} tokens, the others of {self._block_size}; "
                "start all replicas with the same --block-size"
            )
        self.ledger.admit(number, capacity)

    def remove(self, number: int) -> list[int]:
        """Remove a replica, and return its requests. The caller must `add` them again, or report them as `ended`.

        Requests that only this replica may run wait until it is admitted again.
        """
        self._prefixes.forget(self.ledger.slot_of(number))
        requests = self.ledger.remove(number)
        for held in requests:
            self._prefixes.leave(held.prefix_end)
        return [held.seq for held in requests]

    def forget_prefixes(self, number: int) -> None:
        """Note that a replica's prefix cache is empty. It fills again with the requests that the replica is given."""
        self._prefixes.forget(self.ledger.slot_of(number))

    # --- requests ------------------------------------------------------------------------------------------------

    def add(self, request: EngineRequest) -> None:
        """Queue a request: a new one, or one whose replica was removed, which gets back its old place in the queue."""
        self._queues.add(request, self.ledger.open(request.seq, request.priority))

    def next(self) -> tuple[EngineRequest, int] | None:
        """Return the next request and its replica; None if no request can be assigned at present."""
        pinned = min(
            ((place, number) for place, number in self._queues.first_of_each() if self.ledger.has_room(number)),
            default=None,
        )
        first = self._queues.first
        if pinned is not None and (first is None or pinned[0] <= first):
            request = self._queues.take(pinned[0][2])
            self._assign(request, pinned[1])
            return request, pinned[1]
        if first is None or not self.ledger.any_has_room:
            return None
        request = self._queues.take(first[2])
        return request, self._assign(request, None)

    def drew(self, seq: int, count: int) -> None:
        """Note that a replica has drawn `count` more tokens of a request."""
        if not count:
            return
        held = self.ledger.request(seq)
        length, left = held.earlier + held.drawn + count, held.allowed - held.drawn - count
        if length.bit_length() == (length - count).bit_length():
            expected = max(min(held.expected, left), 1)
        else:
            expected = self._lengths.expected_rest(length, left)
        self.ledger.drew(held, count, expected)

    def ended(self, seq: int) -> None:
        """Note that a request has ended, at a replica or in the queue."""
        held = self.ledger.close(seq)
        if held is not None:
            self._prefixes.leave(held.prefix_end)
            self._lengths.ended(held.earlier, held.earlier + held.drawn, by_itself=held.drawn < held.allowed)
        elif seq in self._queues:
            self._queues.take(seq)

    # --- the decision --------------------------------------------------------------------------------------------

    def _digest(self, request: EngineRequest) -> bytes:
        return self._digester.digest(request.tokens, request.cache_salt) if self._digester else b""

    def _known_prefix(self, request: EngineRequest, digest: bytes) -> list[tuple[Node, int]]:
        """Return the nodes of the prompt in the index, with the numbers of blocks, as `PrefixIndex.find` does.

        A prompt whose log-probabilities are wanted is computed as a whole, so none of its tokens are known.
        """
        return [] if request.sampling.prompt_logprobs >= 0 else self._prefixes.find(digest)

    def _shared_in_group(self, request: EngineRequest) -> tuple[int, Mapping[int, int]]:
        """Return how many tokens the requests of its group have in common, and the slots at which some of them are."""
        if request.sampling.prompt_logprobs >= 0:
            return 0, {}
        return request.num_prompt_tokens - 1, self.ledger.slots_of_group(request.group)

    def _choose(self, request: EngineRequest, expected: int, prefix: list[tuple[Node, int]]) -> int:
        """Return the replica for a request that any may run, by the rules at the top of this file."""
        own = request.num_tokens + expected
        most = min(own // 2, self.ledger.mean_work)
        ahead = self.ledger.done - self.ledger.mean_done
        work = self.ledger.work + np.minimum(np.maximum(ahead, -most), most)
        shared, group_slots = self._shared_in_group(request)
        work_with_group = {slot: work[slot] - shared for slot in group_slots}
        for node, blocks in prefix:
            work[holders_of(node)] -= blocks * self._block_size
        for slot, less in work_with_group.items():
            work[slot] = min(work[slot], less)
        slot = self._least(work)
        if self.ledger.work[slot] and self._is_popular(slot, prefix):
            idle = self.ledger.work == 0
            if idle.any():
                slot = self._least(np.where(idle, work, FULL))
        return self.ledger.number_of(slot)

    def _least(self, work: Work) -> int:
        """Return a slot with the least work: the first such slot after the one that was chosen last."""
        least, start = int(work.argmin()), self._last_slot + 1
        if least < start < len(work):
            later = start + int(work[start:].argmin())
            least = later if work[later] == work[least] else least
        return least

    def _is_popular(self, slot: int, prefix: list[tuple[Node, int]]) -> bool:
        """Return whether the part of a prefix that a replica has is used by as many requests as it has copies."""
        for node, _ in reversed(prefix):
            if slot in node.holders:
                return node.active >= len(node.holders)
        return False

    def _assign(self, request: EngineRequest, number: int | None) -> int:
        """Assign a request to the replica `number`; None: to the best one. Return the replica."""
        earlier = request.num_output_tokens
        expected = self._lengths.expected_rest(earlier, request.max_tokens - earlier)
        digest = self._digest(request)
        prefix = self._known_prefix(request, digest)
        if number is None:
            number = self._choose(request, expected, prefix)
        slot = self._last_slot = self.ledger.slot_of(number)
        cached = sum(blocks for node, blocks in prefix if slot in node.holders) * self._block_size
        shared, group_slots = self._shared_in_group(request)
        if slot in group_slots:
            cached = max(cached, shared)
        held = HeldRequest(
            seq=request.seq,
            prompt=max(request.num_tokens - cached, 1),
            allowed=request.max_tokens - earlier,
            earlier=earlier,
            expected=expected,
            group=request.group,
            prefix_end=self._prefixes.remember(slot, digest, self.ledger.capacity_of(number).prefix_blocks),
        )
        self._prefixes.enter(held.prefix_end)
        self.ledger.assign(number, held)
        return number

    def audit(self) -> None:
        """Compare the queues, the ledger and the index of prefixes with each other.

        Raises:
            EngineError: they differ.
        """
        problems = self._queues.problems()
        if problems:
            raise EngineError(f"the router's queues are wrong: {'; '.join(problems)}")
        self.ledger.audit(self._queues)
        self._prefixes.audit()
