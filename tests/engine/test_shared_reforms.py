"""When a rank of one replica dies, the ranks of all replicas in lockstep form their groups anew, and none restarts."""

from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from shoal.activity import AWAKE, PARTS, PAUSED, Activity, ActivityState
from shoal.errors import ClosedError, EngineError
from support.fakes import request, steady
from support.replica_machine import ReplicaMachine
from support.shared_ranks import SharedReplicas

ASLEEP = Activity(ActivityState.ASLEEP, 1, PARTS)
NO_CACHE = Activity(ActivityState.ASLEEP, 1, ("kv_cache",))


@pytest.fixture
def replicas() -> Iterator[SharedReplicas]:
    """Three replicas, of which two have requests that run."""
    found = SharedReplicas(3)
    for replica in range(2):
        found.add(replica, request(replica, [1, 2, 3 + replica], 12))
    for _ in range(4):
        found.step_all()
    assert found.ranks[0].begun.count("step") > 2
    yield found
    found.close()


def loads(replicas: SharedReplicas) -> list[tuple[int, int]]:
    """Return, for each rank, how many times it was replaced, and how many times its process has read its weights."""
    stats = [core.stats() for core in replicas.cores]
    return [(each.rank_replacements, each.ranks[0].loads) for each in stats]


def troubles(replicas: SharedReplicas) -> list[str]:
    return [core.snapshot().trouble for core in replicas.cores]


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_only_the_rank_that_dies_is_replaced(replicas: SharedReplicas, bad: int) -> None:
    replicas.ranks[bad].kill()
    replicas.drain()
    assert loads(replicas) == [(number == bad, 1) for number in range(3)]
    assert [rank.pid % 1000 for rank in replicas.ranks] == [number == bad for number in range(3)]
    assert troubles(replicas) == ["", "", ""]


def test_each_replica_says_why_it_computes_nothing(replicas: SharedReplicas) -> None:
    replicas.ranks[1].kill()
    replicas.step(1)
    replicas.step(0)
    died = "rank 0 (process 2000) was killed by SIGKILL"
    elsewhere = f"replica 1, which shares experts with this one: {died}; the ranks of this replica form their groups"
    assert troubles(replicas) == [
        f"{elsewhere} anew, and keep their weights",
        f"{died}; it is replaced, the other ranks keep their weights",
        "",
    ]
    assert replicas.cores[2].busy, "it must take part"
    replicas.drain()


def test_no_replica_computes_until_the_ranks_of_all_are_ready(replicas: SharedReplicas) -> None:
    """It would wait for the rank of replica 0, which is connected, but may load for a long time."""
    replicas.ranks[1].kill()
    for replica in (1, 0, 2, 0):
        replicas.step(replica)
    for _ in range(30):
        replicas.step(1)
        replicas.step(2)
    assert [rank.begun for rank in replicas.ranks] == [["connect"]] * 3
    assert [rank.num_ended for rank in replicas.ranks[1:]] == [1, 1]
    assert all(core.reforming for core in replicas.cores)
    replicas.drain()


def test_ranks_of_two_replicas_die_at_the_same_time(replicas: SharedReplicas) -> None:
    before = replicas.ranks[0].incarnation
    for bad in (0, 2):
        replicas.ranks[bad].kill()
    replicas.drain()
    assert loads(replicas) == [(1, 1), (0, 1), (1, 1)]
    assert replicas.ranks[0].incarnation == before + 1, "they were replaced together"


@pytest.mark.parametrize("second", [0, 1, 2])
def test_a_rank_dies_while_another_is_replaced(replicas: SharedReplicas, second: int) -> None:
    replicas.ranks[1].kill()
    for replica in (1, 0):
        replicas.step(replica)
    replicas.ranks[second].kill()
    replicas.drain()
    replaced = Counter([1, second])
    assert loads(replicas) == [(replaced[number], 1) for number in range(3)]


def test_a_rank_dies_when_some_replicas_are_ready_and_others_are_not(replicas: SharedReplicas) -> None:
    replicas.ranks[1].kill()
    while not replicas.ranks[0].num_ended or replicas.ranks[0].begun != ["connect"]:
        replicas.step_all()
    replicas.ranks[0].kill()
    replicas.drain()
    assert loads(replicas) == [(1, 1), (1, 1), (0, 1)]


def test_ranks_that_die_again_and_again_end_all_replicas(replicas: SharedReplicas) -> None:
    for _ in range(3):
        replicas.ranks[1].kill()
        replicas.step(1)
    for replica in (0, 2):
        replicas.step(replica)
    why = "rank 0 (process 2002) was killed by SIGKILL; ranks have died 3 times in a row before any step was computed"
    assert replicas.failures == {1: why, 0: f"replica 1: {why}", 2: f"replica 1: {why}"}


def test_a_request_is_suspected_if_ranks_of_another_replica_die_with_it() -> None:
    """Its tokens reach the experts there."""
    replicas = SharedReplicas(2)
    replicas.add(0, request(1, [1, 2, 3], 12))
    for _ in range(3):
        steps = len(replicas.ranks[0].model.plans)
        while len(replicas.ranks[0].model.plans) < steps + 4:
            replicas.step_all()
        replicas.ranks[1].kill()
    while len(replicas.failures) < 2:
        replicas.step_all()
    assert replicas.failures[0].endswith("ranks have died 3 times with the same request")
    assert replicas.failures[0] in replicas.failures[1]
    replicas.close()


@pytest.mark.parametrize("when", ["before", "while ranks are replaced"])
def test_an_engine_that_ends_ends_all(replicas: SharedReplicas, when: str) -> None:
    if when != "before":
        replicas.ranks[1].kill()
        replicas.step_all()
    replicas.lockstep[2].close("replica 2 (host, process 7) has ended")
    for replica in range(2):
        with pytest.raises(EngineError, match=r"^replica 2 \(host, process 7\) has ended$"):
            replicas.cores[replica].updates(0)
        with pytest.raises(ClosedError, match="replica 2"):
            replicas.cores[replica].updates(0)


@pytest.mark.parametrize("activity", [PAUSED, ASLEEP, NO_CACHE])
@pytest.mark.parametrize("bad", [0, 2])
def test_a_rank_dies_while_all_rest(replicas: SharedReplicas, activity: Activity, bad: int) -> None:
    replicas.change_to(activity)
    replicas.ranks[bad].kill()
    replicas.settle()
    assert [rank.model.missing for rank in replicas.ranks] == [set(activity.missing)] * 3
    replicas.change_to(AWAKE)
    replicas.drain()
    again = 2 if "weights" in activity.missing else 1  # those that have slept have read them again
    assert [(each, count in (1, again)) for each, count in loads(replicas)] == [(i == bad, True) for i in range(3)]


@pytest.mark.parametrize("after", range(1, 7))
@pytest.mark.parametrize("to", [ASLEEP, AWAKE])
def test_a_rank_dies_when_some_replicas_sleep_and_others_do_not(
    replicas: SharedReplicas, to: Activity, after: int
) -> None:
    if to == AWAKE:
        replicas.change_to(ASLEEP)
    replicas.change_to(to, then={after: 1})
    replicas.change_to(AWAKE)
    replicas.drain()
    assert [each for each, _ in loads(replicas)] == [0, 1, 0]


class ReformMachine(ReplicaMachine):
    """Requests, deaths and pauses of replicas that are driven in any order."""

    @initialize(size=st.integers(2, 3), depth=st.integers(1, 3))
    def start(self, size: int, depth: int) -> None:
        self.replicas: SharedReplicas = SharedReplicas(size, depth=depth)
        self.killed = [0] * size
        self.may_die = 2  # more may have the same request

    @rule(where=st.integers(0, 2), prompt=st.lists(st.integers(0, 2), min_size=1, max_size=9), most=st.integers(1, 12))
    def add(self, where: int, prompt: list[int], most: int) -> None:
        seq = len(self.replicas.outcomes.specs)
        self.replicas.add(where % len(self.killed), request(seq, prompt, most))

    @precondition(lambda self: self.may_die)
    @rule(where=st.integers(0, 2))
    def kill(self, where: int) -> None:
        where %= len(self.killed)
        if not self.replicas.ranks[where].dead:
            self.replicas.ranks[where].kill()
            self.killed[where] += 1
            self.may_die -= 1

    @rule(activity=st.sampled_from([AWAKE, PAUSED, ASLEEP, NO_CACHE]))
    def change(self, activity: Activity) -> None:
        self.replicas.change_to(activity)

    @rule()
    def rest(self) -> None:
        """Have all requests end, with a step of each replica, after which ranks may die again."""
        self.replicas.change_to(AWAKE)
        for where in range(len(self.killed)):
            self.replicas.add(where, request(len(self.replicas.outcomes.specs), [1], 1))
        self.replicas.drain()
        stats = [core.stats() for core in self.replicas.cores]
        assert [each.rank_replacements for each in stats] == self.killed
        assert not any(each.trouble for each in stats)
        self.may_die = 2

    def teardown(self) -> None:
        if hasattr(self, "replicas"):
            self.rest()
            self.replicas.close()


TestReforms = ReformMachine.TestCase
TestReforms.settings = settings(steady, max_examples=100, stateful_step_count=30)
