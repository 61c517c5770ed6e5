"""Which replica a request goes to: nothing lost, nothing twice, bounded, balanced, and prefixes kept together."""

from collections import Counter, defaultdict
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from shoal.cluster.routing.capacity import ReplicaCapacity, most_held
from shoal.cluster.routing.router import RequestRouter
from shoal.cluster.routing.waiting_lines import WaitingLines
from shoal.wire.base import replace_fields
from shoal.wire.engine import EngineRequest
from shoal.wire.ranks import Sampling
from shoal.wire.tokens import encode_tokens
from support.fakes import request, steady

BLOCK = 4


def room(requests: int = 1000, tokens: int = 10**6, prefixes: int = 100) -> ReplicaCapacity:
    return ReplicaCapacity(requests, tokens, BLOCK, prefixes)


def router(replicas: int, each: ReplicaCapacity | None = None) -> RequestRouter:
    return RequestRouter(dict.fromkeys(range(replicas), each or room()))


def dealt(found: RequestRouter) -> list[tuple[int, int]]:
    """(request, replica) of all that can go now."""
    pairs = []
    while (pair := found.next()) is not None:
        pairs.append((pair[0].seq, pair[1]))
    return pairs


def spread(found: RequestRouter, requests: Sequence[EngineRequest]) -> dict[int, int]:
    """request -> replica, each dealt out as it comes."""
    where: dict[int, int] = {}
    for each in requests:
        found.add(each)
        where.update(dealt(found))
    return where


# --- the books ---------------------------------------------------------------------------------------------------


@given(data=st.data(), replicas=st.integers(1, 4), most=st.integers(1, 5), tokens=st.integers(1, 60))
@steady
def test_nothing_is_lost_nothing_goes_twice_and_nobody_holds_too_much(
    data: st.DataObject, replicas: int, most: int, tokens: int
) -> None:
    found = router(replicas, room(most, tokens))
    held: dict[int, set[int]] = {number: set() for number in range(replicas)}
    waiting: dict[int, EngineRequest] = {}
    ended = 0

    def deal() -> None:
        while (pair := found.next()) is not None:
            each, number = pair
            assert waiting.pop(each.seq) == each
            assert number in held
            held[number].add(each.seq)
            assert len(held[number]) <= most
        if waiting:
            assert all(held.values()), "a replica is idle while a request waits"

    specs: dict[int, EngineRequest] = {}
    count = data.draw(st.integers(1, 25))
    for seq in range(count):
        prompt: list[int] = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=12))
        spec = request(seq, prompt, data.draw(st.integers(1, 9)), group=data.draw(st.integers(-1, 2)))
        specs[seq] = waiting[seq] = spec
        found.add(spec)
        if data.draw(st.booleans()):
            deal()
        busy = [number for number in held if held[number]]
        if data.draw(st.booleans()) and busy:
            number = data.draw(st.sampled_from(busy))
            one = data.draw(st.sampled_from(sorted(held[number])))
            found.drew(one, data.draw(st.integers(0, specs[one].max_tokens)))
            if data.draw(st.booleans()):
                held[number].remove(one)
                found.ended(one)
                ended += 1
        if waiting and data.draw(st.integers(0, 9)) == 0:
            found.ended(waiting.popitem()[0])
            ended += 1
        if len(held) > 1 and data.draw(st.integers(0, 9)) == 0:
            dead = data.draw(st.sampled_from(sorted(held)))
            found.remove(dead)
            for one in held.pop(dead):
                waiting[one] = specs[one]
                found.add(specs[one])
    while ended < count:
        deal()
        number = next(number for number in held if held[number])
        found.ended(held[number].pop())
        ended += 1
    assert not waiting
    assert found.next() is None


def test_those_who_wait_go_by_priority_and_arrival_and_keep_their_place() -> None:
    found = router(2, room(1))
    for seq, priority in enumerate([0, 0, 0, 5, -1]):
        found.add(request(seq, [1], priority=priority))
    assert dealt(found) == [(4, 0), (0, 1)]
    found.remove(1)
    found.add(request(0, [1]))
    found.add(request(9, [1]))
    order: list[int] = []
    for _ in range(5):
        found.ended(order[-1] if order else 4)
        order += [seq for seq, _ in dealt(found)]
    assert order == [0, 1, 2, 9, 3]


def test_a_request_that_is_given_up_while_it_waits_goes_nowhere() -> None:
    found = router(1, room(1))
    for seq in range(3):
        found.add(request(seq, [1]))
    assert dealt(found) == [(0, 0)]
    found.ended(1)
    found.ended(0)
    assert dealt(found) == [(2, 0)]


def test_tokens_bound_too_but_for_one_that_waits() -> None:
    found = router(1, room(tokens=10))
    for seq in range(4):
        found.add(request(seq, [seq] * 9))
    assert [seq for seq, _ in dealt(found)] == [0, 1]


# --- balance -----------------------------------------------------------------------------------------------------


@given(replicas=st.integers(1, 5), count=st.integers(0, 40))
@steady
def test_equal_requests_are_shared_evenly(replicas: int, count: int) -> None:
    where = spread(router(replicas), [request(seq, [seq, 1, 2]) for seq in range(count)])
    loads = Counter(dict.fromkeys(range(replicas), 0))
    loads.update(where.values())
    assert max(loads.values()) - min(loads.values()) <= 1


@given(replicas=st.integers(1, 4), lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40))
@steady
def test_loads_differ_by_no_more_than_the_largest_request(replicas: int, lengths: list[int]) -> None:
    requests = [request(seq, [seq + 100] * length, max_tokens=5) for seq, length in enumerate(lengths)]
    loads = dict.fromkeys(range(replicas), 0)
    for seq, number in spread(router(replicas), requests).items():
        loads[number] += lengths[seq] + 5
    assert max(loads.values()) - min(loads.values()) <= max(lengths) + 5


@given(
    speeds=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    count=st.integers(1, 40),
    shared=st.booleans(),
)
@steady
def test_all_end_at_about_the_same_time(speeds: list[int], count: int, shared: bool) -> None:
    """Replicas of different speed, each of which computes one request after the other."""
    found = router(len(speeds), room(2))
    for seq in range(count):
        found.add(request(seq, [7 if shared else seq] * 8, max_tokens=12))
    queues: dict[int, list[int]] = defaultdict(list)
    progress = dict.fromkeys(range(len(speeds)), 0.0)
    last = dict.fromkeys(range(len(speeds)), 0)
    now = done = 0
    while done < count:
        for seq, number in dealt(found):
            queues[number].append(seq)
        now += 1
        for number, speed in enumerate(speeds):
            progress[number] = progress[number] + speed if queues[number] else 0
            if progress[number] >= 12:
                progress[number] -= 12
                seq = queues[number].pop(0)
                found.drew(seq, 12)
                found.ended(seq)
                last[number] = now
                done += 1
    optimum = 12 * count / sum(speeds)
    assert now <= optimum + 3 * 12 / min(speeds) + 1


def test_what_is_left_to_do_counts_not_what_was_given() -> None:
    found = router(2)
    where = spread(found, [request(0, [1] * 40, max_tokens=40), request(1, [2] * 8, max_tokens=8)])
    found.drew(0, 39)
    assert spread(found, [request(2, [3], max_tokens=4)]) == {2: where[0]}


def test_outputs_are_expected_to_be_as_long_as_those_that_have_ended() -> None:
    found = router(2)
    where = spread(found, [request(seq, [seq], max_tokens=1000) for seq in range(2)])
    found.drew(0, 10)
    found.ended(0)
    found.drew(1, 1)
    assert spread(found, [request(2, [2] * 100, max_tokens=1000)]) == {2: where[0]}
    # The prompt of 100 is more than the few tokens that are to be expected of either.
    assert spread(found, [request(3, [3], max_tokens=1000), request(4, [4], max_tokens=1000)]) == {
        3: where[1],
        4: where[1],
    }


def test_what_is_bound_late_goes_to_the_one_whose_outputs_are_short() -> None:
    """Two replicas that run 16 requests each, a token of each a step. All may draw 64; what the first one gets ends
    sooner."""
    runs, count, lengths = 16, 600, [8, 64]
    found = router(2, room(most_held(runs)))
    for seq in range(count):
        found.add(request(seq, [seq + 100], max_tokens=64))
    held: list[dict[int, int]] = [{}, {}]  # request -> tokens that it has drawn
    shares, last, now = [0, 0], [0, 0], 0
    while sum(shares) < count or any(held):
        for seq, number in dealt(found):
            held[number][seq] = 0
            shares[number] += 1
        now += 1
        for number, running in enumerate(held):
            for seq in list(running)[:runs]:
                running[seq] += 1
                found.drew(seq, 1)
                if running[seq] == lengths[number]:
                    del running[seq]
                    found.ended(seq)
                    last[number] = now
    assert shares[0] > 4 * shares[1]
    assert abs(last[0] - last[1]) <= 2 * 64


def test_ties_go_round() -> None:
    found = router(3)
    order = []
    for seq in range(6):
        where = spread(found, [request(seq, [seq])])
        order.append(where[seq])
        found.ended(seq)
    assert order == [0, 1, 2, 0, 1, 2]


# --- prefixes ----------------------------------------------------------------------------------------------------


def prompts_of(topic: int, count: int, first: int) -> list[EngineRequest]:
    """They share three blocks, and end differently."""
    return [request(first + i, [topic] * 3 * BLOCK + [first + i], max_tokens=4) for i in range(count)]


def test_prompts_that_share_a_prefix_go_to_one_replica() -> None:
    found = router(2)
    a, b = prompts_of(50, 10, 0), prompts_of(60, 10, 100)
    where = spread(found, [each for pair in zip(a, b, strict=True) for each in pair])
    assert len({where[each.seq] for each in a}) == 1
    assert len({where[each.seq] for each in b}) == 1
    assert len(set(where.values())) == 2


def test_nobody_is_idle_for_the_sake_of_a_prefix() -> None:
    where = spread(router(3), prompts_of(50, 3, 0))
    assert sorted(where.values()) == [0, 1, 2]


def test_a_prefix_is_not_worth_any_imbalance() -> None:
    found = router(2)
    where = spread(found, [*prompts_of(50, 1, 0), *prompts_of(60, 1, 100), *prompts_of(50, 20, 1)])
    assert Counter(where.values())[where[100]] > 4


def test_the_outputs_of_one_prompt_share_its_work_even_without_a_prefix_cache() -> None:
    found = router(2, room(prefixes=0))
    spread(found, [request(seq, [seq] * 5) for seq in range(2)])
    outputs = [request(10 + i, [5] * 60, group=10) for i in range(4)]
    where = spread(found, outputs[:1])
    found.drew(10, 1)
    where |= spread(found, outputs[1:])
    assert Counter(where.values()) == {where[10]: 4}, "three more outputs are less than the prompt once more"
    assert found.ledger.work_of(where[10]) == 9 + 3 + 3 * (1 + 4)
    free = router(2, room(prefixes=0))
    assert len(set(spread(free, [request(10 + i, [5, 6], group=10) for i in range(2)]).values())) == 2


def test_a_hot_prefix_gets_copies_where_replicas_are_idle_and_one_conversation_does_not() -> None:
    found = router(4)
    begun = request(0, [7] * 40, max_tokens=9)
    where = spread(found, [begun])
    found.drew(0, 2)
    together = spread(found, prompts_of(7, 3, 1))
    assert sorted({**where, **together}.values()) == [0, 1, 2, 3]
    found = router(4)
    spread(found, [request(0, [7] * 40, max_tokens=1)])
    found.drew(0, 1)
    found.ended(0)
    # Somebody else's request keeps its replica busy for a short time: less than the conversation's past would take.
    found.add(replace_fields(request(1, [9], max_tokens=3), replica=0))
    assert dealt(found) == [(1, 0)]
    assert spread(found, [request(2, [7] * 44, max_tokens=3)]) == {2: 0}


def computed(found: RequestRouter, spec: EngineRequest) -> int:
    """Prompt tokens that replica 0 has to compute for it."""
    before = found.ledger.work_of(0)
    assert spread(found, [spec]) == {spec.seq: 0}
    return found.ledger.work_of(0) - before - spec.max_tokens


def test_a_prefix_is_whole_blocks_of_the_same_salt() -> None:
    found = router(1)
    assert computed(found, request(0, [50] * 3 * BLOCK)) == 3 * BLOCK
    assert computed(found, request(1, [50] * (3 * BLOCK - 1) + [51])) == BLOCK
    assert computed(found, request(2, [51] + [50] * 39)) == 40
    assert computed(found, request(3, [50] * 3 * BLOCK, salt="b")) == 3 * BLOCK
    assert computed(found, request(4, [50] * 40, salt="b")) == 40 - 3 * BLOCK
    assert computed(found, request(5, [50] * 40, salt="b")) == 1, "the last token's logits must come from somewhere"


def test_the_oldest_prefixes_are_forgotten() -> None:
    found = router(1, room(prefixes=8))
    assert [computed(found, prompts_of(topic, 1, topic)[0]) for topic in (50, 60, 50)] == [13, 13, 1]
    assert computed(found, prompts_of(70, 1, 70)[0]) == 13
    assert computed(found, request(1, [50] * 12 + [1])) == 1
    assert computed(found, request(2, [60] * 12 + [2])) == 13


def test_a_prompt_whose_log_probabilities_are_wanted_is_computed() -> None:
    found = router(1)
    spread(found, prompts_of(50, 1, 0))
    wanted = EngineRequest(5, encode_tokens([50] * 13), 13, Sampling(seed=0, prompt_logprobs=1), 1, group=3)
    assert computed(found, wanted) == 13
    assert computed(found, replace_fields(wanted, seq=6)) == 13


# --- replicas that come and go -----------------------------------------------------------------------------------


def test_a_router_may_start_without_replicas() -> None:
    found = RequestRouter()
    for seq in range(3):
        found.add(request(seq, [seq]))
    assert found.next() is None
    assert found.ledger.num_waiting == 3
    found.admit(7, room(2))
    assert dealt(found) == [(0, 7), (1, 7)]
    found.admit(3, room(2))
    assert dealt(found) == [(2, 3)]
    assert (found.ledger.num_waiting, found.ledger.held(7), found.ledger.held(3)) == (0, 2, 1)
    found.audit()


def test_a_replica_that_is_back_has_nothing_in_its_cache() -> None:
    found = router(1)
    spread(found, prompts_of(50, 1, 0))
    found.remove(0)
    found.admit(0, room())
    assert found.ledger.work_of(0) == 0
    assert computed(found, prompts_of(50, 1, 1)[0]) == 13
    with pytest.raises(ValueError, match="replica 0 is there already"):
        found.admit(0, room())
    with pytest.raises(ValueError, match="replica 1 has blocks of 8 tokens, the others of 4"):
        found.admit(1, ReplicaCapacity(1, 1, 8, 1))


def test_a_replica_that_joins_is_not_flooded() -> None:
    """What the others have done before does not count against them."""
    found = router(2)
    for seq in range(100):
        where = spread(found, [request(seq, [seq] * 50, max_tokens=50)])
        found.drew(seq, 50)
        found.ended(seq)
    found.admit(2, room())
    where = spread(found, [request(seq, [seq] * 50, max_tokens=50) for seq in range(100, 130)])
    assert Counter(where.values()) == {0: 10, 1: 10, 2: 10}


# --- requests that may run at one replica only -------------------------------------------------------------------


def pinned(seq: int, number: int, priority: int = 0) -> EngineRequest:
    return replace_fields(request(seq, [seq], priority=priority), replica=number)


def test_one_that_waits_for_its_replica_holds_up_nobody() -> None:
    found = router(2, room(1))
    assert spread(found, [pinned(0, 1), pinned(1, 1), pinned(2, 5)]) == {0: 1}
    assert spread(found, [request(3, [3]), request(4, [4])]) == {3: 0}
    assert found.ledger.num_waiting == 3
    found.ended(0)
    assert dealt(found) == [(1, 1)], "it came before those that may go anywhere"
    found.ended(1)
    assert dealt(found) == [(4, 1)]
    found.admit(5, room(1))
    assert dealt(found) == [(2, 5)]


def test_one_that_waits_for_its_replica_goes_by_priority_and_arrival() -> None:
    found = router(1, room(1))
    assert spread(found, [request(0, [0]), request(1, [1]), pinned(2, 0), request(3, [3]), pinned(4, 0, -1)]) == {0: 0}
    order = [0]
    for _ in range(4):
        found.ended(order[-1])
        order += [seq for seq, _ in dealt(found)]
    assert order == [0, 4, 1, 2, 3]


def test_one_that_waits_for_a_replica_that_is_away_may_be_given_up() -> None:
    found = router(2, room(1))
    spread(found, [pinned(0, 1)])
    found.remove(1)
    found.add(pinned(0, 1))
    assert dealt(found) == []
    found.ended(0)
    found.admit(1, room(1))
    assert dealt(found) == []
    assert found.ledger.num_waiting == 0
    found.audit()


def test_millions_that_give_up_leave_nothing_behind() -> None:
    found = router(1, room(1))
    spread(found, [request(0, [1])])
    for seq in range(1, 3000):
        found.add(request(seq, [1]) if seq % 2 else pinned(seq, seq % 4))
        if seq > 10:
            found.ended(seq - 10)
    assert found.ledger.num_waiting == 10
    found.audit()


def test_places_that_were_left_are_forgotten() -> None:
    lines = WaitingLines()
    for seq in range(3000):
        lines.add(request(seq, [1]) if seq % 2 else pinned(seq, seq % 4), (0, seq, seq))
        if seq >= 10:
            lines.take(seq - 10)
    assert len(lines) == 10
    assert lines.kept <= 2 * 10 + 3


# --- anything at all ---------------------------------------------------------------------------------------------


class Machine(RuleBasedStateMachine):
    """Requests and replicas come and go in any order; the books are audited after each step."""

    @initialize(numbers=st.sets(st.integers(0, 4)))
    def begin(self, numbers: set[int]) -> None:
        self.found = RequestRouter({number: room(2, 30, 6) for number in numbers})
        self.held: dict[int, dict[int, int]] = {number: {} for number in numbers}  # replica -> request -> drawn there
        self.waiting: dict[int, EngineRequest] = {}
        self.specs: dict[int, EngineRequest] = {}

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=20),
        max_tokens=st.integers(1, 20),
        priority=st.integers(0, 1),
        group=st.integers(-1, 1),
        number=st.integers(-5, 5),
        salt=st.sampled_from(["", "a"]),
    )
    def come(self, prompt: list[int], max_tokens: int, priority: int, group: int, number: int, salt: str) -> None:
        seq = len(self.specs)
        spec = request(seq, prompt, max_tokens, priority=priority, group=group, salt=salt)
        self.specs[seq] = self.waiting[seq] = replace_fields(spec, replica=max(number, -1))
        self.found.add(self.waiting[seq])

    @rule(most=st.integers(1, 5))
    def deal(self, most: int) -> None:
        for _ in range(most):
            if (pair := self.found.next()) is None:
                return
            self.take(*pair)

    @rule(data=st.data())
    def draw(self, data: st.DataObject) -> None:
        there = [(seq, number) for number, held in self.held.items() for seq in held]
        if there:
            seq, number = data.draw(st.sampled_from(there))
            spec = self.specs[seq]
            left = spec.max_tokens - self.brought(spec) - self.held[number][seq]
            count = data.draw(st.integers(0, left))
            self.found.drew(seq, count)
            self.held[number][seq] += count
            if count == left or data.draw(st.booleans()):
                self.found.ended(seq)
                del self.held[number][seq]

    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        if self.waiting:
            seq = data.draw(st.sampled_from(sorted(self.waiting)))
            del self.waiting[seq]
            self.found.ended(seq)

    @rule(number=st.integers(0, 5))
    def come_or_go(self, number: int) -> None:
        if number not in self.held:
            self.held[number] = {}
            self.found.admit(number, room(2, 30, 6))
            return
        self.found.remove(number)
        for seq, drawn in self.held.pop(number).items():
            spec = self.specs[seq]
            spec = replace_fields(spec, tokens=spec.tokens + encode_tokens([9] * drawn))
            self.specs[seq] = self.waiting[seq] = spec
            self.found.add(spec)

    def take(self, spec: EngineRequest, number: int) -> None:
        """In its turn, to where it may go."""

        def place(seq: int) -> tuple[int, int]:
            return self.specs[seq].priority, seq

        assert self.waiting.pop(spec.seq) == spec
        assert spec.replica in {-1, number}
        earlier = [self.specs[seq] for seq in self.waiting if place(seq) < place(spec.seq)]
        assert all(other.replica >= 0 and not self.has_room(other.replica) for other in earlier)
        assert self.has_room(number)
        self.held[number][spec.seq] = 0

    def has_room(self, number: int) -> bool:
        held = self.held.get(number)
        return held is not None and len(held) < 2

    @staticmethod
    def brought(spec: EngineRequest) -> int:
        return spec.num_output_tokens

    @invariant()
    def books_are_right(self) -> None:
        self.found.audit()
        assert self.found.ledger.num_waiting == len(self.waiting)
        for number, held in self.held.items():
            assert self.found.ledger.held(number) == len(held) <= 2
            assert (self.found.ledger.work_of(number) > 0) == bool(held)

    def teardown(self) -> None:
        if not hasattr(self, "found"):
            return
        for number in range(6):
            if number not in self.held:
                self.come_or_go(number)
        while self.waiting or any(self.held.values()):
            while (pair := self.found.next()) is not None:
                self.take(*pair)
            for number, held in self.held.items():
                assert held or not any(spec.replica in {-1, number} for spec in self.waiting.values())
                for seq in held:
                    self.found.ended(seq)
                held.clear()
        self.books_are_right()
        assert self.found.ledger.num_open == 0
        for number in range(6):
            self.found.remove(number)
        self.found.audit()  # nothing is left of prompts, groups and lines


TestMachine = Machine.TestCase
TestMachine.settings = settings(steady, stateful_step_count=40)
