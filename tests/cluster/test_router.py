"""Which replica a request goes to: nothing lost, nothing twice, bounded, balanced, and prefixes kept together."""

from collections import Counter, defaultdict
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from shoal import wire
from shoal.cluster.router import Room, Router, most_held
from shoal.engine.request import encode_tokens
from support.fakes import request, steady

BLOCK = 4


def room(requests: int = 1000, tokens: int = 10**6, prefixes: int = 100) -> Room:
    return Room(requests, tokens, BLOCK, prefixes)


def router(replicas: int, each: Room | None = None) -> Router:
    return Router(dict.fromkeys(range(replicas), each or room()))


def dealt(found: Router) -> list[tuple[int, int]]:
    """(request, replica) of all that can go now."""
    pairs = []
    while (pair := found.next()) is not None:
        pairs.append((pair[0].seq, pair[1]))
    return pairs


def spread(found: Router, requests: Sequence[wire.EngineRequest]) -> dict[int, int]:
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
    waiting: dict[int, wire.EngineRequest] = {}
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

    specs: dict[int, wire.EngineRequest] = {}
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
            found.drew(one, number, data.draw(st.integers(0, specs[one].max_tokens)))
            if data.draw(st.booleans()):
                held[number].remove(one)
                found.ended(one, number)
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
        found.ended(held[number].pop(), number)
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
        found.ended(order[-1] if order else 4, 0)
        order += [seq for seq, _ in dealt(found)]
    assert order == [0, 1, 2, 9, 3]


def test_a_request_that_is_given_up_while_it_waits_goes_nowhere() -> None:
    found = router(1, room(1))
    for seq in range(3):
        found.add(request(seq, [1]))
    assert dealt(found) == [(0, 0)]
    found.ended(1)
    found.ended(0, 0)
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
                found.drew(seq, number, 12)
                found.ended(seq, number)
                last[number] = now
                done += 1
    optimum = 12 * count / sum(speeds)
    assert now <= optimum + 3 * 12 / min(speeds) + 1


def test_what_is_left_to_do_counts_not_what_was_given() -> None:
    found = router(2)
    where = spread(found, [request(0, [1] * 40, max_tokens=40), request(1, [2] * 8, max_tokens=8)])
    found.drew(0, where[0], 39)
    assert spread(found, [request(2, [3], max_tokens=4)]) == {2: where[0]}


def test_outputs_are_expected_to_be_as_long_as_those_that_have_ended() -> None:
    found = router(2)
    where = spread(found, [request(seq, [seq], max_tokens=1000) for seq in range(2)])
    found.drew(0, where[0], 10)
    found.ended(0, where[0])
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
                found.drew(seq, number, 1)
                if running[seq] == lengths[number]:
                    del running[seq]
                    found.ended(seq, number)
                    last[number] = now
    assert shares[0] > 4 * shares[1]
    assert abs(last[0] - last[1]) <= 2 * 64


def test_ties_go_round() -> None:
    found = router(3)
    order = []
    for seq in range(6):
        where = spread(found, [request(seq, [seq])])
        order.append(where[seq])
        found.ended(seq, where[seq])
    assert order == [0, 1, 2, 0, 1, 2]


# --- prefixes ----------------------------------------------------------------------------------------------------


def prompts_of(topic: int, count: int, first: int) -> list[wire.EngineRequest]:
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


def test_the_outputs_of_one_prompt_go_to_one_replica_unless_one_is_idle() -> None:
    found = router(2, room(prefixes=0))
    busy = spread(found, [request(seq, [seq]) for seq in range(2)])
    assert set(busy.values()) == {0, 1}
    where = spread(found, [request(10 + i, [5, 6], group=10) for i in range(8)])
    assert len({where[10], where[11]}) == 1
    loads = Counter(where.values())
    assert loads == {0: 4, 1: 4}, "for no more than one request's work"
    free = router(2, room(prefixes=0))
    assert len(set(spread(free, [request(10 + i, [5, 6], group=10) for i in range(2)]).values())) == 2


def test_a_prefix_is_whole_blocks_of_the_same_salt() -> None:
    found = router(1)
    spread(found, [request(0, [50] * 3 * BLOCK)])

    def cached(prompt: list[int], salt: str = "") -> int:
        return found._replicas[0].cached(found._hashes(request(1, prompt, salt=salt)))

    assert cached([50] * 40) == 3
    assert cached([50] * (3 * BLOCK - 1) + [51]) == 2
    assert cached([51] + [50] * 40) == 0
    assert cached([50] * 40, salt="b") == 0


def test_the_oldest_prefixes_are_forgotten() -> None:
    found = router(1, room(prefixes=5))
    spread(found, prompts_of(50, 1, 0))
    assert found._replicas[0].cached(found._hashes(prompts_of(50, 1, 9)[0])) == 3
    spread(found, prompts_of(60, 1, 1))
    assert len(found._replicas[0].prefixes) == 5
    assert found._replicas[0].cached(found._hashes(prompts_of(60, 1, 9)[0])) == 3
    assert found._replicas[0].cached(found._hashes(prompts_of(50, 1, 9)[0])) == 0


def test_a_prompt_whose_log_probabilities_are_wanted_is_computed() -> None:
    found = router(1)
    spread(found, prompts_of(50, 1, 0))
    wanted = wire.EngineRequest(5, encode_tokens([50] * 13), wire.Sampling(seed=0, prompt_logprobs=1), 1)
    assert found._hashes(wanted) == ()
