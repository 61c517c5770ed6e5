"""A discrete-event simulation of replicas and requests, to compare ways of routing. A seed determines the run."""

import heapq
import random
from bisect import bisect
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate, count
from time import perf_counter_ns
from typing import Protocol

from shoal.cluster.routing.capacity import ReplicaCapacity, max_requests_held
from shoal.wire.engine import EngineRequest
from shoal.wire.ranks import Sampling
from shoal.wire.tokens import num_tokens

_STEPS_PER_EVENT = 4  # steps that are one event, if they compute only single tokens
_GREEDY = Sampling(seed=0)


class Policy(Protocol):
    """A way of routing, such as `RequestRouter`."""

    def add(self, request: EngineRequest) -> None: ...

    def next(self) -> tuple[EngineRequest, int] | None: ...

    def drew(self, seq: int, count: int) -> None: ...

    def ended(self, seq: int) -> None: ...


@dataclass(frozen=True)
class Machine:
    """The speed and size of a replica. A step takes `step_s`, and more for each token."""

    max_num_seqs: int = 32
    step_tokens: int = 2048
    step_s: float = 0.010
    prompt_token_s: float = 0.0001
    output_token_s: float = 0.0002
    blocks: int = 4096
    block_size: int = 16

    @property
    def capacity(self) -> ReplicaCapacity:
        return ReplicaCapacity(
            max_requests_held(self.max_num_seqs), self.blocks * self.block_size, self.block_size, self.blocks
        )

    def seconds(self, prompt: float, output: float) -> float:
        """Return how many seconds of a full replica a request takes."""
        return prompt * self.prompt_token_s + output * (self.step_s / self.max_num_seqs + self.output_token_s)


@dataclass(frozen=True)
class Traffic:
    """Requests with shared prefixes.

    The popularity of prefixes follows Zipf's law, and they have 0 to `most_shared` tokens. The rest of a prompt and the
    output have exponentially distributed lengths. Arrivals are a Poisson process. `load` is a share of what the
    replicas can do without cached prompts.
    """

    requests: int
    replicas: int
    machine: Machine = Machine()
    load: float = 0.8
    prefixes: int = 5000
    most_shared: int = 2000
    mean_own: int = 128
    mean_output: int = 128
    max_tokens: int = 512
    seed: int = 0

    def __iter__(self) -> Iterator["Arrival"]:
        rng = random.Random(self.seed)
        shared = [rng.randbytes(4 * rng.randint(0, self.most_shared)) for _ in range(self.prefixes)]
        cumulative = list(accumulate(1 / rank for rank in range(1, self.prefixes + 1)))
        mean_shared = sum(
            (cumulative[i] - (cumulative[i - 1] if i else 0)) * num_tokens(shared[i]) for i in range(self.prefixes)
        )
        prompt = mean_shared / cumulative[-1] + self.mean_own
        rate = self.load * self.replicas / self.machine.seconds(prompt, self.mean_output)
        now = 0.0
        for seq in range(self.requests):
            now += rng.expovariate(rate)
            prefix = bisect(cumulative, rng.random() * cumulative[-1])
            own = rng.randbytes(4 * max(round(rng.expovariate(1 / self.mean_own)), 1))
            length = min(max(round(rng.expovariate(1 / self.mean_output)), 1), self.max_tokens)
            tokens = shared[prefix] + own
            request = EngineRequest(seq, tokens, num_tokens(tokens), _GREEDY, self.max_tokens)
            yield Arrival(now, request, prefix, num_tokens(shared[prefix]), length)


@dataclass(slots=True, eq=False)
class Arrival:
    at: float
    request: EngineRequest
    prefix: int
    shared: int
    length: int  # of its output; the policy does not know it
    to_compute: int = 0
    drawn: int = 0


@dataclass(slots=True)
class _Simulated:
    """A simulated replica.

    Requests run in the order in which they came: those that draw tokens first, then prompts in chunks. Prompts and
    outputs stay in the cache until their blocks are needed; those that were unused longest are dropped first.
    """

    machine: Machine
    waiting: deque[Arrival] = field(default_factory=deque)
    prompts: list[Arrival] = field(default_factory=list)
    drawing: list[Arrival] = field(default_factory=list)
    cache: OrderedDict[int, int] = field(
        default_factory=OrderedDict
    )  # prefix -> blocks; the rest of a request has the key -1 - seq
    cached_blocks: int = 0
    stepping: bool = False
    steps: int = 0  # steps of the current event
    chunks: list[tuple[Arrival, int]] = field(default_factory=list)
    computed: int = 0
    hits: int = 0

    def begin(self) -> float:
        """Start a step, or several equal ones. Return how long they take."""
        machine = self.machine
        while self.waiting and len(self.prompts) + len(self.drawing) < machine.max_num_seqs:
            self._start(self.waiting.popleft())
        left = machine.step_tokens - len(self.drawing)
        self.chunks = []
        for arrival in self.prompts:
            chunk = min(arrival.to_compute, left)
            if chunk:
                self.chunks.append((arrival, chunk))
            left -= chunk
        tokens = sum(chunk for _, chunk in self.chunks)
        self.steps = 1 if tokens else min(_STEPS_PER_EVENT, *(each.length - each.drawn for each in self.drawing))
        self.stepping = True
        one = machine.step_s + tokens * machine.prompt_token_s + len(self.drawing) * machine.output_token_s
        return self.steps * one

    def end(self) -> list[tuple[Arrival, int]]:
        """End the step. Return the requests that have drawn tokens, and how many."""
        self.stepping = False
        drew = [(each, self.steps) for each in self.drawing]
        self.computed += len(drew) * self.steps
        for arrival, chunk in self.chunks:
            arrival.to_compute -= chunk
            self.computed += chunk
            if not arrival.to_compute:
                self.prompts.remove(arrival)
                self.drawing.append(arrival)
                drew.append((arrival, 1))
        for arrival, tokens in drew:
            arrival.drawn += tokens
        self.drawing = [each for each in self.drawing if each.drawn < each.length]
        return drew

    def _start(self, arrival: Arrival) -> None:
        size = self.machine.block_size
        whole = arrival.shared // size
        prompt = arrival.request.num_tokens
        hit = whole * size if self._use(arrival.prefix, whole) else 0
        self._use(-1 - arrival.request.seq, (prompt + arrival.length) // size - whole)
        self.hits += hit
        arrival.to_compute = prompt - hit
        self.prompts.append(arrival)

    def _use(self, content: int, blocks: int) -> bool:
        if content in self.cache:
            self.cache.move_to_end(content)
            return True
        self.cache[content] = blocks
        self.cached_blocks += blocks
        while self.cached_blocks > self.machine.blocks:
            self.cached_blocks -= self.cache.popitem(last=False)[1]
        return False


@dataclass
class Outcome:
    computed: list[int]  # tokens that each replica computed
    hits: int  # prompt tokens that were cached
    first_token_s: list[float]
    decision_ns: list[int]  # time of `add` and the next call of `next`
    book_ns: int  # time of all calls of `drew` and `ended`
    seconds: float  # simulated time

    @property
    def busiest(self) -> float:
        """The tokens of the busiest replica over the mean."""
        return max(self.computed) * len(self.computed) / sum(self.computed)


def simulate(traffic: Traffic, policy: Policy) -> Outcome:
    replicas = [_Simulated(traffic.machine) for _ in range(traffic.replicas)]
    known: dict[int, Arrival] = {}
    events: list[tuple[float, int]] = []  # when a step of a replica ends
    outcome = Outcome([], 0, [], [], 0, 0.0)
    arrivals = iter(traffic)
    coming = next(arrivals, None)

    def go_on(number: int) -> None:
        replica = replicas[number]
        if not replica.stepping and (replica.waiting or replica.prompts or replica.drawing):
            heapq.heappush(events, (outcome.seconds + replica.begin(), number))

    def hand_over(found: tuple[EngineRequest, int] | None) -> None:
        if found is not None:
            replicas[found[1]].waiting.append(known[found[0].seq])
            go_on(found[1])

    while coming is not None or events:
        if coming is not None and (not events or coming.at <= events[0][0]):
            outcome.seconds = coming.at
            known[coming.request.seq] = coming
            begun = perf_counter_ns()
            policy.add(coming.request)
            found = policy.next()
            outcome.decision_ns.append(perf_counter_ns() - begun)
            hand_over(found)
            coming = next(arrivals, None)
            continue
        outcome.seconds, number = heapq.heappop(events)
        drew = replicas[number].end()
        begun = perf_counter_ns()
        for arrival, tokens in drew:
            policy.drew(arrival.request.seq, tokens)
            if arrival.drawn == arrival.length:
                policy.ended(arrival.request.seq)
        outcome.book_ns += perf_counter_ns() - begun
        for arrival, tokens in drew:
            if arrival.drawn == tokens:
                outcome.first_token_s.append(outcome.seconds - arrival.at)
            if arrival.drawn == arrival.length:
                del known[arrival.request.seq]
        while (found := policy.next()) is not None:
            hand_over(found)
        go_on(number)
    assert not known, f"{len(known)} requests are still there"
    outcome.computed = [replica.computed for replica in replicas]
    outcome.hits = sum(replica.hits for replica in replicas)
    return outcome


# --- simpler ways of routing ------------------------------------------------------------------------------


class _AtOnce:
    """Ways of routing that assign a request when it arrives."""

    def __init__(self, replicas: int) -> None:
        self.replicas = replicas
        self.come: deque[EngineRequest] = deque()

    def add(self, request: EngineRequest) -> None:
        self.come.append(request)

    def next(self) -> tuple[EngineRequest, int] | None:
        if not self.come:
            return None
        request = self.come.popleft()
        return request, self.choose(request)

    def choose(self, request: EngineRequest) -> int:
        raise NotImplementedError

    def drew(self, seq: int, count: int) -> None:
        pass

    def ended(self, seq: int) -> None:
        pass


class RoundRobin(_AtOnce):
    def __init__(self, replicas: int) -> None:
        super().__init__(replicas)
        self._next = count()

    def choose(self, request: EngineRequest) -> int:
        return next(self._next) % self.replicas


class LeastLoaded(_AtOnce):
    """Chooses the replica with the fewest unfinished requests; among equal ones, the next after the last choice."""

    def __init__(self, replicas: int) -> None:
        super().__init__(replicas)
        self._held = [0] * replicas
        self._holders: dict[int, int] = {}
        self._last = -1

    def choose(self, request: EngineRequest) -> int:
        least = min(self._held)
        try:
            self._last = self._held.index(least, self._last + 1)
        except ValueError:
            self._last = self._held.index(least)
        self._held[self._last] += 1
        self._holders[request.seq] = self._last
        return self._last

    def ended(self, seq: int) -> None:
        self._held[self._holders.pop(seq)] -= 1


class Affinity(_AtOnce):
    """Chooses by consistent hashing (Karger et al., 1997) of the first block of a prompt."""

    def __init__(self, replicas: int, block_size: int, points: int = 100) -> None:
        super().__init__(replicas)
        rng = random.Random(0)
        self._ring = sorted((rng.random(), number) for number in range(replicas) for _ in range(points))
        self._first = 4 * block_size

    def choose(self, request: EngineRequest) -> int:
        point = random.Random(request.tokens[: self._first]).random()
        return self._ring[bisect(self._ring, (point, -1)) % len(self._ring)][1]
