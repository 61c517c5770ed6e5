"""The router: it decides which replica a request goes to, by the work left to do and by who has its prefix already.

Requests wait here, not at the replicas, which hold no more than keeps them busy: a request that is bound late goes to
the replica that is quicker, so that all end at about the same time. They go by priority and arrival. A request that may
run at one replica only waits while that one is full or away, and no other waits behind it.

**The rule.** A request goes to the replica that will have the least work left once it has the request: tokens of
prompts that it has yet to compute, tokens that its outputs are expected to get, and of the request what is not in its
prefix cache. This is minimum completion time on unrelated machines (Ibarra and Kim, "Heuristic algorithms for
scheduling independent tasks on nonidentical processors", 1977); for tasks that are done quicker where their data lie it
keeps queues bounded wherever any policy does (Xie, Yekkehkhany and Lu, "Scheduling with multi-level data locality:
throughput and heavy-traffic optimality", 2016). So a request follows its prefix as long as computing the prefix again
would cost more than what the holder is ahead of the others by. Beyond that it goes where work is least, and that
replica has the prefix from then on: a prefix gets as many copies as its share of the traffic needs, each paid for once.

The lengths of outputs are estimates, and holders of hot prefixes are always a little ahead; both add up over time. So
what a replica has done beyond the mean counts too, as the integral term of a controller does, but for no more than the
mean work left, and half of the request's own: where no replica is busy there is nothing to balance, and a replica that
is slower, and has done less for that reason, is not made to catch up.

The rule is short-sighted where replicas are idle: a few requests with a hot prefix never make its holder busy enough
to give it away. Hence a second one: while a prefix has no more copies than requests in flight, it goes to an idle
replica rather than to a holder that is not. A prefix that is used by one request at a time, such as a conversation,
stays where it is.
"""

from collections.abc import Mapping

import numpy as np

from shoal.cluster.routing.capacity import ReplicaCapacity
from shoal.cluster.routing.ledger import FULL, HeldRequest, RequestLedger, Work
from shoal.cluster.routing.output_lengths import OutputLengths
from shoal.cluster.routing.prefixes import Digester, Node, PrefixIndex, slots
from shoal.cluster.routing.waiting_lines import WaitingLines
from shoal.errors import EngineError
from shoal.wire.engine import EngineRequest


class RequestRouter:
    """Takes requests in, and says which goes where next. Replicas are numbers, which may come and go. `ledger` says
    which replica has which request.

    A decision costs a few operations on arrays with an element for each replica, and as many steps in the index of
    prefixes as there are places where prompts with this beginning part.
    """

    def __init__(self, capacities: Mapping[int, ReplicaCapacity] | None = None) -> None:
        self.ledger = RequestLedger()
        self._lines = WaitingLines()
        self._last = -1  # the slot that was chosen last
        self._lengths = OutputLengths()
        self._prefixes = PrefixIndex()
        self._digester: Digester | None = None
        self._block_size = 1
        for number, capacity in (capacities or {}).items():
            self.admit(number, capacity)

    # --- replicas ------------------------------------------------------------------------------------------------

    def admit(self, number: int, capacity: ReplicaCapacity) -> None:
        """Note a replica that is there, with nothing in its prefix cache.

        Raises:
            ValueError: it is there already, or differs in its block size.
        """
        if self.ledger.has(number):
            raise ValueError(f"replica {number} is there already")
        if self._digester is None and capacity.prefixes:
            self._digester, self._block_size = Digester(capacity.block_size), capacity.block_size
        if capacity.prefixes and capacity.block_size != self._block_size:
            raise ValueError(
                f"replica {number} has blocks of {capacity.block_size} tokens, the others of {self._block_size}; "
                f"start all with the same --block-size"
            )
        self.ledger.admit(number, capacity)

    def remove(self, number: int) -> list[int]:
        """Forget a replica. Return the requests that it had: they are to be added again, or to be `ended`. Requests
        that wait for it and no other wait until it is admitted again."""
        self._prefixes.forget(self.ledger.slot_of(number))
        had = self.ledger.remove(number)
        for held in had:
            self._prefixes.leave(held.end)
        return [held.seq for held in had]

    def forget_prefixes(self, number: int) -> None:
        """Note that a replica's prefix cache is empty. It fills again with the requests that the replica is given."""
        self._prefixes.forget(self.ledger.slot_of(number))

    # --- requests ------------------------------------------------------------------------------------------------

    def add(self, request: EngineRequest) -> None:
        """Take a new request; or one that goes on elsewhere with its tokens, and keeps its place in the line."""
        self._lines.add(request, self.ledger.open(request.seq, request.priority))

    def next(self) -> tuple[EngineRequest, int] | None:
        """Return the next request and its replica; None while nothing that waits can go anywhere."""
        pinned = min(
            ((place, number) for place, number in self._lines.first_of_each() if self.ledger.takes(number)),
            default=None,
        )
        first = self._lines.first
        if pinned is not None and (first is None or pinned[0] <= first):
            request = self._lines.take(pinned[0][2])
            self._hand_over(request, pinned[1])
            return request, pinned[1]
        if first is None or not self.ledger.any_takes:
            return None
        request = self._lines.take(first[2])
        return request, self._hand_over(request, None)

    def drew(self, seq: int, count: int) -> None:
        """Note that a replica has drawn `count` more tokens of a request."""
        if not count:
            return
        held = self.ledger.request(seq)
        length, left = held.before + held.drawn + count, held.allowed - held.drawn - count
        if length.bit_length() == (length - count).bit_length():
            rest = max(min(held.rest, left), 1)
        else:
            rest = self._lengths.rest(length, left)
        self.ledger.drew(held, count, rest)

    def ended(self, seq: int) -> None:
        """Note that a request has ended: at a replica, or while it waited."""
        held = self.ledger.close(seq)
        if held is not None:
            self._prefixes.leave(held.end)
            self._lengths.ended(held.before, held.before + held.drawn, by_itself=held.drawn < held.allowed)
        elif seq in self._lines:
            self._lines.take(seq)

    # --- the decision --------------------------------------------------------------------------------------------

    def _digest(self, request: EngineRequest) -> bytes:
        return self._digester.digest(request.tokens, request.cache_salt) if self._digester else b""

    def _path(self, request: EngineRequest, digest: bytes) -> list[tuple[Node, int]]:
        """Return the part of its prompt that is known. A prompt whose log-probabilities are wanted is computed whole:
        nothing of it counts as known."""
        return [] if request.sampling.prompt_logprobs >= 0 else self._prefixes.find(digest)

    def _shared(self, request: EngineRequest) -> tuple[int, Mapping[int, int]]:
        """Return the tokens that the requests of its group have in common, and the slots where there are some."""
        if request.sampling.prompt_logprobs >= 0:
            return 0, {}
        return request.num_prompt_tokens - 1, self.ledger.sharers(request.group)

    def _choose(self, request: EngineRequest, rest: int, path: list[tuple[Node, int]]) -> int:
        own = request.num_tokens + rest
        most = min(own // 2, self.ledger.mean_work)
        ahead = self.ledger.done - self.ledger.mean_done
        work = self.ledger.work + np.minimum(np.maximum(ahead, -most), most)
        shared, sharers = self._shared(request)
        apart = {slot: work[slot] - shared for slot in sharers}
        for node, blocks in path:
            work[slots(node)] -= blocks * self._block_size
        for slot, alone in apart.items():
            work[slot] = min(work[slot], alone)
        slot = self._least(work)
        if self.ledger.work[slot] and self._is_hot(slot, path):
            idle = self.ledger.work == 0
            if idle.any():
                slot = self._least(np.where(idle, work, FULL))
        return self.ledger.number_of(slot)

    def _least(self, work: Work) -> int:
        """Return a slot with the least work: the first such slot behind the one that was chosen last."""
        least, behind = int(work.argmin()), self._last + 1
        if least < behind < len(work):
            later = behind + int(work[behind:].argmin())
            least = later if work[later] == work[least] else least
        return least

    def _is_hot(self, slot: int, path: list[tuple[Node, int]]) -> bool:
        """Return whether the prefix that a replica has is in use at least as often as there are copies of it."""
        for node, _ in reversed(path):
            if slot in node.holders:
                return node.active >= len(node.holders)
        return False

    def _hand_over(self, request: EngineRequest, number: int | None) -> int:
        """Give a request to its replica; None: to the best. Return the replica."""
        before = request.num_output_tokens
        rest = self._lengths.rest(before, request.max_tokens - before)
        digest = self._digest(request)
        path = self._path(request, digest)
        if number is None:
            number = self._choose(request, rest, path)
        slot = self._last = self.ledger.slot_of(number)
        cached = sum(blocks for node, blocks in path if slot in node.holders) * self._block_size
        shared, sharers = self._shared(request)
        if slot in sharers:
            cached = max(cached, shared)
        held = HeldRequest(
            seq=request.seq,
            prompt=max(request.num_tokens - cached, 1),
            allowed=request.max_tokens - before,
            before=before,
            rest=rest,
            group=request.group,
            end=self._prefixes.remember(slot, digest, self.ledger.capacity_of(number).prefixes),
        )
        self._prefixes.enter(held.end)
        self.ledger.give(number, held)
        return number

    def audit(self) -> None:
        """Hold all books against each other.

        Raises:
            EngineError: they differ.
        """
        problems = self._lines.problems()
        if problems:
            raise EngineError(f"the router's lines are wrong: {'; '.join(problems)}")
        self.ledger.audit(self._lines)
        self._prefixes.audit()
