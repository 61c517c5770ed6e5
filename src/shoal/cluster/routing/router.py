"""Which replica a request goes to: by work left to do, and by who has its prefix already. Free of processes.

Requests wait here, not at the replicas, which hold no more than keeps them busy: what is bound late goes to whoever is
quicker, so that all end at about the same time. They go by priority and arrival; one that may run at one replica only
waits while that is full or away, and nobody waits behind it.

**Where it goes.** To the replica that will have the least work left once it has the request: tokens of prompts that it
has yet to compute, tokens that its outputs are expected to get, and of the request what is not in its prefix cache.
This is minimum completion time on unrelated machines (Ibarra and Kim, "Heuristic algorithms for scheduling independent
tasks on nonidentical processors", 1977); for tasks that are done quicker where their data lie it keeps queues bounded
wherever any policy does (Xie, Yekkehkhany and Lu, "Scheduling with multi-level data locality: throughput and
heavy-traffic optimality", 2016). So a request follows its prefix as long as computing the prefix again would cost more
than what the holder is ahead of the others by. Beyond that it goes where work is least, and that replica has the prefix
from then on: a prefix gets as many copies as its share of the traffic needs, each paid for once.

What outputs will come to is an estimate, and holders of hot prefixes are always a little ahead; both add up over time.
So what a replica has done beyond the mean counts too, as the integral term of a controller does, but for no more than
the mean work left, and half of the request's own: where nobody is busy there is nothing to balance, and a
replica that is slower, and has done less for that reason, is not made to catch up.

The rule is short-sighted where replicas are idle: a few requests with a hot prefix never make its holder busy enough
to give it away. Hence a second one: while a prefix has no more copies than requests in flight, it goes to an idle
replica rather than to a holder that is not. A prefix that is used by one request at a time, such as a conversation,
stays where it is.
"""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from shoal.cluster.routing.output_lengths import OutputLengths
from shoal.cluster.routing.prefixes import Digester, Node, PrefixIndex, slots
from shoal.errors import EngineError
from shoal.wire.engine import EngineRequest

_MEMORY = 1 << 18  # tokens that a replica has done: beyond that the past counts half
_FULL = 1 << 60  # tokens of work: more than there ever are
_Work = npt.NDArray[np.int64]  # [slots]
_Place = tuple[int, int, int]  # in the line: priority, arrival, request


def most_held(max_num_seqs: int) -> int:
    """Requests that a replica holds: those that run, and a few that are there when some of them end."""
    return max_num_seqs + max(max_num_seqs // 8, 2)


@dataclass(frozen=True, slots=True)
class ReplicaCapacity:
    """What a replica can use at a time: more than so many requests, or tokens of requests, would wait there."""

    requests: int
    tokens: int
    block_size: int  # the same for all replicas
    prefixes: int  # blocks of past prompts that it may remember; 0: it has no prefix cache


@dataclass(slots=True)
class _Held:
    """A request at a replica."""

    prompt: int  # tokens to compute before it draws
    allowed: int  # output tokens that it may draw there
    before: int  # output tokens that it brought along
    rest: int  # output tokens that are expected yet
    group: int
    end: Node | None  # of its prompt in the index of prefixes
    drawn: int = 0


@dataclass(slots=True)
class _Replica:
    """`prompt`, `rest` and `tokens` are sums over what it holds. Nobody says when a prompt is computed: the first token
    of its output does."""

    slot: int
    room: ReplicaCapacity
    held: dict[int, _Held] = field(default_factory=dict)
    prompt: int = 0
    rest: int = 0
    noted: int = 0  # its work, as it is in the sum over all
    tokens: int = 0  # of requests that it holds, in blocks of their own

    @property
    def full(self) -> bool:
        """One that waits there is always allowed: it is the next to run."""
        return len(self.held) >= self.room.requests or (len(self.held) > 1 and self.tokens >= self.room.tokens)

    @property
    def work(self) -> int:
        """Tokens that it has yet to compute, as far as can be known."""
        return self.prompt + self.rest


@dataclass(slots=True)
class _Waiting:
    request: EngineRequest
    place: _Place


class _Line:
    """Places, the first one first. Those that leave from the middle are remembered until they are half of all."""

    def __init__(self) -> None:
        self._heap: list[_Place] = []
        self._gone: set[_Place] = set()

    def __len__(self) -> int:
        return len(self._heap) - len(self._gone)

    @property
    def first(self) -> _Place:
        """There must be one."""
        return self._heap[0]

    @property
    def is_mostly_gone(self) -> bool:
        """True if more than half of its places are those of requests that have left it."""
        return 2 * len(self._gone) > len(self._heap)

    def push(self, place: _Place) -> None:
        heapq.heappush(self._heap, place)

    def leave(self, place: _Place) -> None:
        self._gone.add(place)
        if self.is_mostly_gone:
            self._heap = [each for each in self._heap if each not in self._gone]
            self._gone.clear()
            heapq.heapify(self._heap)
        while self._heap and self._heap[0] in self._gone:
            self._gone.remove(heapq.heappop(self._heap))


class RequestRouter:
    """Takes requests in, and says which goes where next. Replicas are numbers, which may come and go.

    A decision costs a few operations on arrays with an element for each replica, and as many steps in the index of
    prefixes as there are places where prompts with this beginning part.
    """

    def __init__(self, rooms: Mapping[int, ReplicaCapacity] | None = None) -> None:
        self._replicas: dict[int, _Replica] = {}
        self._numbers: list[int] = []  # by slot
        self._free: list[int] = []  # slots, a heap
        self._work: _Work = np.full(8, _FULL, np.int64)  # of each slot, _FULL where nothing can go
        self._done: _Work = np.zeros(8, np.int64)  # tokens that each slot has computed, the past fading
        self._all_done = 0
        self._all_work = 0  # what replicas have left to do
        self._last = -1  # the slot that was chosen last
        self._waiting: dict[int, _Waiting] = {}
        self._line = _Line()  # of those that may go anywhere
        self._lines: dict[int, _Line] = {}  # replica -> those that may go nowhere else; none is empty
        self._called: set[int] = set()  # replicas with such a line that are not full
        self._orders: dict[int, tuple[int, int]] = {}  # priority and arrival of requests that have not ended
        self._arrivals = 0
        self._lengths = OutputLengths()
        self._prefixes = PrefixIndex()
        self._digester: Digester | None = None
        self._block_size = 1
        self._groups: dict[int, dict[int, int]] = {}  # group -> slot -> requests of it that are there
        for number, room in (rooms or {}).items():
            self.admit(number, room)

    # --- replicas ------------------------------------------------------------------------------------------------

    def admit(self, number: int, room: ReplicaCapacity) -> None:
        """A replica is there, with nothing in its prefix cache.

        Raises:
            ValueError: it is there already, or differs in its block size.
        """
        if number in self._replicas:
            raise ValueError(f"replica {number} is there already")
        if self._digester is None and room.prefixes:
            self._digester, self._block_size = Digester(room.block_size), room.block_size
        if room.prefixes and room.block_size != self._block_size:
            raise ValueError(
                f"replica {number} has blocks of {room.block_size} tokens, the others of {self._block_size}; "
                f"start all with the same --block-size"
            )
        if not self._free:
            self._free.append(len(self._numbers))
            self._numbers.append(number)
        slot = heapq.heappop(self._free)
        self._numbers[slot] = number
        if slot == len(self._work):
            self._work = np.concatenate([self._work, np.full(slot, _FULL, np.int64)])
            self._done = np.concatenate([self._done, np.zeros(slot, np.int64)])
        mean = self._all_done // max(len(self._replicas), 1)
        self._done[slot] = mean
        self._all_done += mean
        self._replicas[number] = _Replica(slot, room)
        self._note(number)

    def remove(self, number: int) -> None:
        """A replica is no more. Those that it held are to be added again, or to be `ended`. Those that wait for it
        alone wait until it is admitted again."""
        replica = self._replicas.pop(number)
        for held in replica.held.values():
            self._leave(replica, held)
        self._prefixes.forget(replica.slot)
        self._work[replica.slot] = _FULL
        self._all_work -= replica.noted
        self._all_done -= int(self._done[replica.slot])
        self._called.discard(number)
        heapq.heappush(self._free, replica.slot)

    def forget_prefixes(self, number: int) -> None:
        """A replica's prefix cache is empty. What it computes is known again as it is given requests."""
        self._prefixes.forget(self._replicas[number].slot)

    @property
    def unfinished(self) -> int:
        """The number of requests that have not ended."""
        return len(self._orders)

    @property
    def waiting(self) -> int:
        """Requests that wait here."""
        return len(self._waiting)

    def held(self, number: int) -> int:
        """Requests that a replica has."""
        return len(self._replicas[number].held)

    def work(self, number: int) -> int:
        """Tokens that a replica has yet to compute, as far as can be known."""
        return self._replicas[number].work

    # --- requests ------------------------------------------------------------------------------------------------

    def add(self, request: EngineRequest) -> None:
        """A new one; or one that goes on elsewhere, with the tokens that it has, at the place it had in the line."""
        if request.seq not in self._orders:
            self._arrivals += 1
            self._orders[request.seq] = (request.priority, self._arrivals)
        place = (*self._orders[request.seq], request.seq)
        self._waiting[request.seq] = _Waiting(request, place)
        if request.replica < 0:
            self._line.push(place)
            return
        self._lines.setdefault(request.replica, _Line()).push(place)
        if request.replica in self._replicas:
            self._note(request.replica)

    def next(self) -> tuple[EngineRequest, int] | None:
        """The next request and its replica; None while nothing that waits can go anywhere."""
        called = min(((self._lines[number].first, number) for number in self._called), default=None)
        anywhere = called is None or bool(self._line and self._line.first < called[0])
        if anywhere and (not self._line or self._work.min() == _FULL):
            return None
        request = self._take(self._line.first if called is None or anywhere else called[0])
        before = request.num_output_tokens
        rest = self._lengths.rest(before, request.max_tokens - before)
        digest = self._digest(request)
        path = self._path(request, digest)
        number = self._choose(request, rest, path) if called is None or anywhere else called[1]
        self._hand_over(request, number, rest, digest, path)
        return request, number

    def drew(self, seq: int, number: int, count: int) -> None:
        """A replica has drawn `count` more tokens of a request."""
        if not count:
            return
        replica = self._replicas[number]
        held = replica.held[seq]
        if not held.drawn:
            replica.prompt -= held.prompt
        self._count(replica.slot, count if held.drawn else count + held.prompt)
        length, left = held.before + held.drawn + count, held.allowed - held.drawn - count
        if length.bit_length() == (length - count).bit_length():
            rest = max(min(held.rest, left), 1)
        else:
            rest = self._lengths.rest(length, left)
        replica.rest += rest - held.rest
        replica.tokens += count
        held.drawn += count
        held.rest = rest
        self._note(number)

    def ended(self, seq: int, number: int | None = None) -> None:
        """A request has ended: at a replica, or while it waited here."""
        del self._orders[seq]
        if number is not None:
            replica = self._replicas[number]
            held = replica.held.pop(seq)
            replica.prompt -= 0 if held.drawn else held.prompt
            replica.rest -= held.rest
            replica.tokens -= held.prompt + held.drawn
            self._leave(replica, held)
            self._lengths.ended(held.before, held.before + held.drawn, by_itself=held.drawn < held.allowed)
            self._note(number)
        elif seq in self._waiting:
            self._take(self._waiting[seq].place)

    # --- the decision --------------------------------------------------------------------------------------------

    def _digest(self, request: EngineRequest) -> bytes:
        return self._digester.digest(request.tokens, request.cache_salt) if self._digester else b""

    def _path(self, request: EngineRequest, digest: bytes) -> list[tuple[Node, int]]:
        """What of its prompt is known. Nothing where that is of no use: log-probabilities of a prompt come from
        computing it."""
        return [] if request.sampling.prompt_logprobs >= 0 else self._prefixes.find(digest)

    def _shared(self, request: EngineRequest) -> tuple[int, dict[int, int]]:
        """Tokens that those of its group have in common, and the slots where there are some."""
        if request.sampling.prompt_logprobs >= 0:
            return 0, {}
        return request.num_prompt_tokens - 1, self._groups.get(request.group, {})

    def _choose(self, request: EngineRequest, rest: int, path: list[tuple[Node, int]]) -> int:
        own = request.num_tokens + rest
        most = min(own // 2, self._all_work // len(self._replicas))
        ahead = self._done - self._all_done // len(self._replicas)
        work = self._work + np.minimum(np.maximum(ahead, -most), most)
        shared, sharers = self._shared(request)
        apart = {slot: work[slot] - shared for slot in sharers}
        for node, blocks in path:
            work[slots(node)] -= blocks * self._block_size
        for slot, alone in apart.items():
            work[slot] = min(work[slot], alone)
        slot = self._least(work)
        if self._work[slot] and self._is_hot(slot, path):
            idle = self._work == 0
            if idle.any():
                slot = self._least(np.where(idle, work, _FULL))
        return self._numbers[slot]

    def _least(self, work: _Work) -> int:
        """Of those with the least work the first behind the one that was chosen last."""
        least, behind = int(work.argmin()), self._last + 1
        if least < behind < len(work):
            later = behind + int(work[behind:].argmin())
            least = later if work[later] == work[least] else least
        return least

    def _is_hot(self, slot: int, path: list[tuple[Node, int]]) -> bool:
        """Whether the prefix that a replica has is no more often there than in use."""
        for node, _ in reversed(path):
            if slot in node.holders:
                return node.active >= len(node.holders)
        return False

    def _hand_over(
        self, request: EngineRequest, number: int, rest: int, digest: bytes, path: list[tuple[Node, int]]
    ) -> None:
        replica = self._replicas[number]
        slot = self._last = replica.slot
        cached = sum(blocks for node, blocks in path if slot in node.holders) * self._block_size
        shared, sharers = self._shared(request)
        if slot in sharers:
            cached = max(cached, shared)
        before = request.num_output_tokens
        held = _Held(
            prompt=max(request.num_tokens - cached, 1),
            allowed=request.max_tokens - before,
            before=before,
            rest=rest,
            group=request.group,
            end=self._prefixes.remember(slot, digest, replica.room.prefixes),
        )
        replica.held[request.seq] = held
        replica.prompt += held.prompt
        replica.rest += held.rest
        replica.tokens += held.prompt
        self._enter(replica, held)
        self._note(number)

    # --- the books -----------------------------------------------------------------------------------------------

    def audit(self) -> None:
        """Holds sums against what they are sums of.

        Raises:
            EngineError: they differ.
        """
        wrong = []
        for number, replica in self._replicas.items():
            held = replica.held.values()
            prompt = sum(each.prompt for each in held if not each.drawn)
            sums = (prompt, sum(each.rest for each in held), sum(each.prompt + each.drawn for each in held))
            line = self._lines.get(number)
            if sums != (replica.prompt, replica.rest, replica.tokens):
                wrong.append(
                    f"replica {number}: {replica.prompt} + {replica.rest}, {replica.tokens} tokens, not {sums}"
                )
            if self._work[replica.slot] != (_FULL if replica.full else replica.work):
                wrong.append(f"replica {number}: {self._work[replica.slot]} in the table, not {replica.work}")
            if (number in self._called) != (line is not None and not replica.full):
                wrong.append(f"replica {number}: its own line is not looked at as it should be")
        lines = [self._line, *self._lines.values()]
        if sum(map(len, lines)) != len(self._waiting) or not all(self._lines.values()):
            wrong.append(f"{len(self._waiting)} wait, {[len(line) for line in lines]} in lines")
        if any(line.is_mostly_gone for line in lines):
            wrong.append("a line has more places of requests that have left it than others")
        if not self._waiting.keys() <= self._orders.keys():
            wrong.append("some that wait have no place")
        if int((self._work != _FULL).sum()) != sum(not replica.full for replica in self._replicas.values()):
            wrong.append("slots without a replica take requests")
        if self._all_work != sum(replica.work for replica in self._replicas.values()):
            wrong.append(f"{self._all_work} tokens of work in all")
        done = int(sum(self._done[replica.slot] for replica in self._replicas.values()))
        if done != self._all_done:
            wrong.append(f"{done} tokens were done, not {self._all_done}")
        grouped = sum(each.group >= 0 for replica in self._replicas.values() for each in replica.held.values())
        in_groups = sum(count for group in self._groups.values() for count in group.values())
        if grouped != in_groups or not all(self._groups.values()):
            wrong.append(f"{grouped} requests in groups, {self._groups}")
        if wrong:
            raise EngineError(f"the router's books are wrong: {'; '.join(wrong)}")
        self._prefixes.audit()

    def _note(self, number: int) -> None:
        """Something about a replica, or about those that wait for it alone, has changed."""
        replica = self._replicas[number]
        full = replica.full
        self._all_work += replica.work - replica.noted
        replica.noted = replica.work
        self._work[replica.slot] = _FULL if full else replica.work
        if full or number not in self._lines:
            self._called.discard(number)
        else:
            self._called.add(number)

    def _count(self, slot: int, tokens: int) -> None:
        self._done[slot] += tokens
        self._all_done += tokens
        if self._all_done > 2 * _MEMORY * len(self._replicas):
            self._done //= 2
            self._all_done = int(sum(self._done[replica.slot] for replica in self._replicas.values()))

    def _take(self, place: _Place) -> EngineRequest:
        """Out of the line that it is in."""
        request = self._waiting.pop(place[2]).request
        number = request.replica
        if number < 0:
            self._line.leave(place)
            return request
        self._lines[number].leave(place)
        if not self._lines[number]:
            del self._lines[number]
            self._called.discard(number)
        return request

    def _enter(self, replica: _Replica, held: _Held) -> None:
        if held.group >= 0:
            slots_ = self._groups.setdefault(held.group, {})
            slots_[replica.slot] = slots_.get(replica.slot, 0) + 1
        node = held.end
        while node is not None:
            node.active += 1
            node = node.parent

    def _leave(self, replica: _Replica, held: _Held) -> None:
        if held.group >= 0:
            slots_ = self._groups[held.group]
            slots_[replica.slot] -= 1
            if not slots_[replica.slot]:
                del slots_[replica.slot]
            if not slots_:
                del self._groups[held.group]
        node = held.end
        while node is not None:
            node.active -= 1
            node = node.parent
