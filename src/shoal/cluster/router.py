"""Which replica a request goes to: by work left to do, and by who has its prefix already. Free of processes.

Requests wait here, not at the replicas, which hold no more than keeps them busy: what is bound late goes to whoever is
quicker, so that all end at about the same time.
"""

import heapq
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from shoal import wire

_TOKEN_BYTES = 4


def most_held(max_num_seqs: int) -> int:
    """Requests that a replica holds: those that run, and a few that are there when some of them end."""
    return max_num_seqs + max(max_num_seqs // 8, 2)


@dataclass(frozen=True, slots=True)
class Room:
    """What a replica can use at a time: more than so many requests, or tokens of requests, would wait there."""

    requests: int
    tokens: int
    block_size: int
    prefixes: int  # blocks of past prompts that it may remember; 0: it has no prefix cache


@dataclass(slots=True)
class _Held:
    """A request at a replica: prompt tokens that it has to compute, and output tokens it may draw and has drawn."""

    prompt: int
    allowed: int
    group: int
    drawn: int = 0


@dataclass(slots=True)
class _Replica:
    """`prompt`, `allowed` and `drawn` are sums over what it holds. Nobody says when a prompt is computed: the first
    token of its output does."""

    room: Room
    held: dict[int, _Held] = field(default_factory=dict)
    prompt: int = 0
    allowed: int = 0
    drawn: int = 0
    tokens: int = 0  # of requests that it holds, in blocks of their own
    prefixes: OrderedDict[int, None] = field(default_factory=OrderedDict)  # hashes of blocks, the oldest first
    groups: Counter[int] = field(default_factory=Counter)  # group -> requests of it that are here

    @property
    def full(self) -> bool:
        """One that waits there is always allowed: it is the next to run."""
        return len(self.held) >= self.room.requests or (len(self.held) > 1 and self.tokens >= self.room.tokens)

    def cached(self, hashes: Iterable[int]) -> int:
        """Leading blocks of a prompt that are likely in its cache."""
        count = 0
        for block in hashes:
            if block not in self.prefixes:
                break
            count += 1
        return count

    def remember(self, hashes: Iterable[int]) -> None:
        for block in hashes:
            self.prefixes[block] = None
            self.prefixes.move_to_end(block)
        while len(self.prefixes) > self.room.prefixes:
            self.prefixes.popitem(last=False)

    def let_go(self, seq: int) -> _Held:
        held = self.held.pop(seq)
        self.prompt -= 0 if held.drawn else held.prompt
        self.allowed -= held.allowed
        self.drawn -= held.drawn
        self.tokens -= held.prompt + held.drawn
        self.groups[held.group] -= 1
        if not self.groups[held.group]:
            del self.groups[held.group]
        return held


@dataclass(slots=True, eq=False)
class _Waiting:
    request: wire.EngineRequest
    order: tuple[int, int]  # priority and arrival
    drawn: int  # output tokens that it brings along
    hashes: tuple[int, ...]

    def __lt__(self, other: "_Waiting") -> bool:
        return self.order < other.order


class Router:
    """Takes requests in, and says which goes where next. Replicas are numbers."""

    def __init__(self, rooms: Mapping[int, Room]) -> None:
        self._replicas = {number: _Replica(room) for number, room in rooms.items()}
        self._prefix_caching = any(room.prefixes for room in rooms.values())
        self._block_size = min(room.block_size for room in rooms.values())
        self._waiting: list[_Waiting] = []  # a heap
        self._orders: dict[int, tuple[int, int]] = {}  # of requests that have not ended
        self._arrivals = 0
        self._last = -1  # the replica that was chosen last
        self._ended_drawn = 1  # output tokens of requests that have ended, and what they were allowed
        self._ended_allowed = 1

    def add(self, request: wire.EngineRequest) -> None:
        """A new one; or one that goes on elsewhere, with the tokens that it has, at the place it had in the line."""
        length = len(request.tokens) // _TOKEN_BYTES
        drawn = length - request.prompt_len if request.prompt_len else 0
        if request.seq not in self._orders:
            self._arrivals += 1
            self._orders[request.seq] = (request.priority, self._arrivals)
        waiting = _Waiting(request, self._orders[request.seq], drawn, self._hashes(request))
        heapq.heappush(self._waiting, waiting)

    def next(self) -> tuple[wire.EngineRequest, int] | None:
        """The next request and its replica; None while all are full, or nothing waits."""
        while self._waiting and self._waiting[0].request.seq not in self._orders:  # it was given up
            heapq.heappop(self._waiting)
        open_ = [number for number, replica in self._replicas.items() if not replica.full]
        if not self._waiting or not open_:
            return None
        waiting = heapq.heappop(self._waiting)
        number = self._choose(waiting, open_)
        self._hand_over(waiting, number)
        return waiting.request, number

    def _choose(self, waiting: _Waiting, open_: list[int]) -> int:
        """The least work left. A replica that has its group or its prefix is preferred while nobody else is idle, by
        no more than one request's work."""
        idle = [number for number in open_ if not self._replicas[number].held]
        if idle:
            most = max(self._cached_tokens(waiting, number) for number in idle)
            return self._in_turn([number for number in idle if self._cached_tokens(waiting, number) == most])
        group = waiting.request.group
        preferred = [number for number in open_ if group >= 0 and self._replicas[number].groups[group]]
        if not preferred:
            most = max(self._cached_tokens(waiting, number) for number in open_)
            preferred = [number for number in open_ if self._cached_tokens(waiting, number) == most]
        least, there = self._least(open_), self._least(preferred)
        ahead = self._work(there) - self._work(least)
        own = len(waiting.request.tokens) // _TOKEN_BYTES + self._expected(waiting.request.max_tokens - waiting.drawn)
        return there if ahead <= own else least

    def _least(self, numbers: list[int]) -> int:
        work = {number: self._work(number) for number in numbers}
        least = min(work.values())
        return self._in_turn([number for number in numbers if work[number] == least])

    def _in_turn(self, numbers: list[int]) -> int:
        """The first behind the one that was chosen last."""
        return min(numbers, key=lambda number: (number <= self._last, number))

    def _work(self, number: int) -> float:
        """Tokens that a replica has yet to compute, as far as can be known."""
        replica = self._replicas[number]
        return replica.prompt + max(self._expected(replica.allowed) - replica.drawn, len(replica.held))

    def _expected(self, allowed: int) -> float:
        """Output tokens of requests that may have so many, by how it was with those that have ended."""
        return allowed * self._ended_drawn / self._ended_allowed

    def _cached_tokens(self, waiting: _Waiting, number: int) -> int:
        return self._replicas[number].cached(waiting.hashes) * self._block_size

    def _hand_over(self, waiting: _Waiting, number: int) -> None:
        replica, request = self._replicas[number], waiting.request
        length = len(request.tokens) // _TOKEN_BYTES
        held = _Held(
            prompt=max(length - self._cached_tokens(waiting, number), 1),
            allowed=request.max_tokens - waiting.drawn,
            group=request.group,
        )
        replica.held[request.seq] = held
        replica.prompt += held.prompt
        replica.allowed += held.allowed
        replica.tokens += held.prompt
        replica.groups[request.group] += 1
        replica.remember(waiting.hashes)
        self._last = number

    def drew(self, seq: int, number: int, count: int) -> None:
        """A replica has drawn `count` more tokens of a request."""
        replica = self._replicas[number]
        held = replica.held[seq]
        if count and not held.drawn:
            replica.prompt -= held.prompt
        held.drawn += count
        replica.drawn += count
        replica.tokens += count

    def ended(self, seq: int, number: int | None = None) -> None:
        """A request has ended: at a replica, or while it waited here."""
        del self._orders[seq]
        if number is not None:
            held = self._replicas[number].let_go(seq)
            self._ended_drawn += held.drawn
            self._ended_allowed += held.allowed

    def remove(self, number: int) -> None:
        """A replica is no more. Those that it held are to be added again, or to be `ended`."""
        del self._replicas[number]

    def _hashes(self, request: wire.EngineRequest) -> tuple[int, ...]:
        """Of each block of a prompt, with all before it. None where they are of no use: log-probabilities of a prompt
        come from computing it."""
        if not self._prefix_caching or request.sampling.prompt_logprobs >= 0:
            return ()
        size = self._block_size * _TOKEN_BYTES
        found, last = [], hash(request.cache_salt)
        for start in range(0, len(request.tokens) - size + 1, size):
            last = hash((last, request.tokens[start : start + size]))
            found.append(last)
        return tuple(found)
