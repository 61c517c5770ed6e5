"""The ledger of requests against a model of a few dictionaries, and its audit against books that are wrong."""

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shoal.cluster.routing.capacity import ReplicaCapacity
from shoal.cluster.routing.ledger import FULL, HeldRequest, RequestLedger
from shoal.errors import EngineError
from support.fakes import steady

CAPACITY = ReplicaCapacity(requests=3, tokens=40, block_size=4, prefixes=0)


def held(seq: int, prompt: int = 5, rest: int = 7, group: int = -1) -> HeldRequest:
    return HeldRequest(seq, prompt, allowed=20, before=0, rest=rest, group=group, end=None)


class Machine(RuleBasedStateMachine):
    """Replicas and requests come and go in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = RequestLedger()
        self.waiting: set[int] = set()
        self.held: dict[int, dict[int, HeldRequest]] = {}
        self.places: dict[int, tuple[int, int, int]] = {}
        self.seqs = 0

    @rule(number=st.integers(0, 3))
    def admit_or_remove(self, number: int) -> None:
        if number not in self.held:
            self.ledger.admit(number, CAPACITY)
            self.held[number] = {}
            return
        found = self.ledger.remove(number)
        assert {each.seq: each for each in found} == self.held.pop(number)
        self.waiting |= {each.seq for each in found}

    @rule(priority=st.integers(0, 1))
    def open(self, priority: int) -> None:
        self.places[self.seqs] = self.ledger.open(self.seqs, priority)
        self.waiting.add(self.seqs)
        self.seqs += 1

    @precondition(lambda self: self.waiting and self.held)
    @rule(data=st.data(), prompt=st.integers(1, 30), rest=st.integers(1, 20), group=st.integers(-1, 1))
    def give(self, data: st.DataObject, prompt: int, rest: int, group: int) -> None:
        number = data.draw(st.sampled_from(sorted(self.held)))
        seq = data.draw(st.sampled_from(sorted(self.waiting)))
        assert self.ledger.open(seq, 9) == self.places[seq], "it keeps its place"
        self.held[number][seq] = held(seq, prompt, rest, group)
        self.ledger.give(number, self.held[number][seq])
        self.waiting.discard(seq)

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data(), count=st.integers(1, 9), rest=st.integers(1, 9))
    def draw(self, data: st.DataObject, count: int, rest: int) -> None:
        seq = data.draw(st.sampled_from(sorted(seq for each in self.held.values() for seq in each)))
        self.ledger.drew(self.ledger.request(seq), count, rest)

    @precondition(lambda self: self.places)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(sorted(self.places)))
        del self.places[seq]
        self.waiting.discard(seq)
        had = next((each.pop(seq) for each in self.held.values() if seq in each), None)
        assert self.ledger.close(seq) is had

    @invariant()
    def all_is_counted(self) -> None:
        self.ledger.audit(self.waiting)
        assert self.ledger.num_open == len(self.places)
        assert self.ledger.num_waiting == len(self.waiting)
        assert self.ledger.num_held == sum(map(len, self.held.values()))
        for number, requests in self.held.items():
            assert self.ledger.held(number) == len(requests)
            assert all(self.ledger.holder(seq) == number for seq in requests)
            left = sum(each.rest + (0 if each.drawn else each.prompt) for each in requests.values())
            assert self.ledger.work_of(number) == left
            slot = self.ledger.slot_of(number)
            assert self.ledger.number_of(slot) == number
            assert self.ledger.work[slot] == (left if self.ledger.takes(number) else FULL)
            groups = {each.group for each in requests.values() if each.group >= 0}
            assert groups == {group for group in (0, 1) if slot in self.ledger.sharers(group)}
            if len(requests) >= CAPACITY.requests:
                assert not self.ledger.takes(number)


TestMachine = Machine.TestCase
TestMachine.settings = settings(steady, stateful_step_count=40)


def test_what_a_replica_had_waits_when_it_is_removed() -> None:
    ledger = RequestLedger()
    ledger.admit(4, CAPACITY)
    for seq in range(2):
        ledger.open(seq, 0)
    ledger.give(4, held(1))
    assert (ledger.num_waiting, ledger.num_held, ledger.holder(1), ledger.holder(0)) == (1, 1, 4, None)
    assert [each.seq for each in ledger.remove(4)] == [1]
    assert (ledger.num_waiting, ledger.num_held, ledger.held(4)) == (2, 0, 0)


def forget_one(ledger: RequestLedger) -> list[int]:
    return []


def count_twice(ledger: RequestLedger) -> list[int]:
    ledger.request(1).rest += 1
    return [0]


def lose_a_table(ledger: RequestLedger) -> list[int]:
    ledger.work[0] += 1
    return [0]


def do_more(ledger: RequestLedger) -> list[int]:
    ledger.done[0] += 1
    return [0]


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (forget_one, "1 requests wait or are at replicas, but 2 are open"),
        (count_twice, r"replica 4: 5 \+ 7, 5 tokens are noted, not \(5, 8, 5\)"),
        (lose_a_table, "replica 4: 13 in the table, not 12"),
        (do_more, "1 tokens were computed in all, but 0 are noted"),
    ],
)
def test_an_audit_finds_what_is_wrong(spoil: Callable[[RequestLedger], list[int]], why: str) -> None:
    ledger = RequestLedger()
    ledger.admit(4, CAPACITY)
    for seq in range(2):
        ledger.open(seq, 0)
    ledger.give(4, held(1))
    ledger.audit([0])
    with pytest.raises(EngineError, match=why):
        ledger.audit(spoil(ledger))
