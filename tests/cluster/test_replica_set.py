"""A set of replicas over engines of a few lines, which may die at any time: requests get what they would have had."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.cluster.replica_set import ReplicaSet
from shoal.cluster.routing.capacity import ReplicaCapacity
from shoal.cluster.stats import merged
from shoal.errors import ClosedError, ReplicasFailed, RequestError
from shoal.wire.base import encode, replace_fields
from shoal.wire.engine import Finish, SeqUpdate, from_engine
from shoal.wire.ranks import PromptLogprobs, RankStats, TokenLogprobs
from shoal.wire.tokens import decode_tokens
from support.fake_replica import STATS, FakeReplica
from support.fakes import Outcomes, alone, request, steady


def replica_set(replicas: Sequence[FakeReplica], most: int = 3, **options: Any) -> ReplicaSet:
    room = ReplicaCapacity(most, 10**6, 4, 100)
    return ReplicaSet(
        dict(enumerate(replicas)), dict.fromkeys(range(len(replicas)), room), wait_for=lambda *_: None, **options
    )


def finish_all(found: ReplicaSet, outcomes: Outcomes, each_round: Callable[[], None] = lambda: None) -> None:
    while outcomes.open:
        each_round()
        outcomes.take(found.updates(0))


@given(data=st.data(), size=st.integers(1, 4), seed=st.integers(0, 99))
@steady
def test_every_request_gets_the_tokens_of_its_undisturbed_twin(data: st.DataObject, size: int, seed: int) -> None:
    replicas = [FakeReplica(number, seed + number) for number in range(size)]
    found, outcomes = replica_set(replicas, data.draw(st.integers(1, 5))), Outcomes()
    logprobs: dict[int, list[float]] = {}
    deaths: Counter[int] = Counter()
    for seq in range(data.draw(st.integers(1, 15))):
        prompt = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=9))
        spec = request(seq, prompt, data.draw(st.integers(1, 8)), stop_ids=data.draw(st.sampled_from([[], [3]])))
        outcomes.added(spec)
        found.add(spec)
    while outcomes.open:
        alive = [replica for replica in replicas if not replica.dead]
        if len(alive) > 1 and data.draw(st.integers(0, 3)) == 0:
            victim = data.draw(st.sampled_from(alive))
            victim.dead = "was killed"
            deaths.update(victim.held.keys())
        if data.draw(st.integers(0, 5)) == 0:
            seq = data.draw(st.sampled_from(outcomes.open))
            outcomes.may_abort.add(seq)
            found.abort([seq, 999, seq])
        updates = found.updates(0)
        given_up = {update.seq for update in updates if update.error}
        assert all(deaths[seq] >= 2 for seq in given_up)
        outcomes.may_abort |= given_up
        outcomes.take(updates)
        for update in updates:
            logprobs.setdefault(update.seq, []).extend(entry.chosen for entry in update.logprobs)
    for seq, values in logprobs.items():
        start = len(decode_tokens(outcomes.specs[seq].tokens)) + 1
        assert values == [float(start + i) for i in range(len(outcomes.tokens[seq]))]
    assert found.stats().running == 0
    found.close()
    assert all(replica.closed for replica in replicas)


def poll(found: ReplicaSet, take: Callable[[list[SeqUpdate]], object] = lambda _: None) -> None:
    """Until everything that has happened must have been seen."""
    for _ in range(20):
        take(found.updates(0))


def test_a_request_goes_on_from_the_tokens_that_it_has() -> None:
    replicas = [FakeReplica(number) for number in range(2)]
    found, outcomes = replica_set(replicas), Outcomes()
    spec = request(7, [1, 2, 3], max_tokens=9)
    outcomes.added(spec)
    found.add(spec)
    while len(outcomes.tokens[7]) < 4:
        outcomes.take(found.updates(0))
    first, second = sorted(replicas, key=lambda replica: 7 not in replica.held)
    first.dead = "was killed by SIGKILL"
    finish_all(found, outcomes)
    (again,) = second.added
    assert (again.num_prompt_tokens, again.max_tokens, again.sampling) == (3, 9, spec.sampling)
    assert decode_tokens(again.tokens) == [1, 2, 3, *alone(spec)[:4]]
    assert first.closed


def test_the_warning_says_who_died_and_what_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    replicas = [FakeReplica(number) for number in range(3)]
    found = replica_set(replicas)
    for seq in range(6):
        found.add(request(seq, [seq]))
    replicas[1].dead = "was killed by SIGKILL"
    with caplog.at_level("WARNING", "shoal"):
        for _ in range(3):
            found.updates(0)
    assert [record.getMessage() for record in caplog.records] == [
        "replica 1 was killed by SIGKILL; its 2 unfinished requests go on at the 2 replicas left"
    ]
    assert found.num_live == 2


def test_with_none_left_the_error_names_every_cause_after_what_had_finished() -> None:
    replicas = [FakeReplica(number) for number in range(2)]
    found, outcomes = replica_set(replicas), Outcomes()
    for seq, length in enumerate([1, 1, 50, 50]):
        spec = request(seq, [seq], max_tokens=length)
        outcomes.added(spec)
        found.add(spec)
    while len(outcomes.finished) < 2:
        outcomes.take(found.updates(0))
    replicas[0].dead, replicas[1].dead = "was killed by SIGKILL", "is stopped"
    with pytest.raises(ReplicasFailed, match="no replica is left: replica 0 was killed by SIGKILL; replica 1 is stop"):
        poll(found, outcomes.take)
    assert len(outcomes.finished) == 2
    with pytest.raises(ClosedError, match="no replica is left"):
        found.add(request(9, [1]))
    with pytest.raises(ClosedError, match="no replica is left"):
        found.stats()
    found.abort([2])
    found.close()


class Scripted(FakeReplica):
    """Says what it is told to."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.script: list[list[SeqUpdate]] = []

    def updates(self, timeout: float) -> list[SeqUpdate]:
        self._check_alive()
        return self.script.pop(0) if self.script else []


def test_what_came_before_the_last_one_died_is_handed_out_before_the_error() -> None:
    """It gives the end of a request, and can't be given the next one any more."""

    class Dying(Scripted):
        def updates(self, timeout: float) -> list[SeqUpdate]:
            found = super().updates(timeout)
            self.dead = "was killed by SIGKILL" if found else ""
            return found

    replica = Dying(0)
    found = replica_set([replica], most=1)
    for seq in range(2):
        found.add(request(seq, [seq]))
    replica.script = [[SeqUpdate(0, (5,), finish=Finish.STOP)]]
    assert [update.seq for update in found.updates(0)] == [0]
    with pytest.raises(ReplicasFailed, match="no replica is left: replica 0 was killed by SIGKILL"):
        found.updates(0)


def test_those_that_share_experts_end_together_with_the_name_of_the_one_that_died() -> None:
    replicas = [FakeReplica(number) for number in range(3)]
    found = replica_set(replicas, together=True)
    for seq in range(9):
        found.add(request(seq, [seq]))
    found.updates(0)
    replicas[0].died, replicas[0].dead = False, "rank 0: all_to_all failed: connection closed"
    replicas[2].dead = "was killed by SIGKILL"
    with pytest.raises(ReplicasFailed, match=r"^replica 2 was killed by SIGKILL; replicas that share experts end tog"):
        poll(found)
    assert all(replica.closed for replica in replicas)
    found.close()
    with pytest.raises(ClosedError):
        found.updates(0)


def test_one_of_those_that_share_experts_fails_when_it_is_asked_how_it_is() -> None:
    replicas = [FakeReplica(number) for number in range(3)]
    found = replica_set(replicas, together=True)
    replicas[1].dead = "was killed by SIGKILL"
    with pytest.raises(ReplicasFailed, match=r"^replica 1 was killed by SIGKILL; replicas that share experts end tog"):
        found.stats()


class Poisoned(FakeReplica):
    """Dies of request 0, once that has drawn so many tokens."""

    deadly = 0

    def updates(self, timeout: float) -> list[SeqUpdate]:
        if len(self.drawn.get(0, ())) >= self.deadly and 0 in self.held:
            self.dead = "was killed by SIGSEGV"
        return super().updates(timeout)


@pytest.mark.parametrize("deadly", [0, 5])
def test_a_request_that_kills_ends_alone(deadly: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Poisoned, "deadly", deadly)
    replicas = [Poisoned(number) for number in range(3)]
    found, outcomes = replica_set(replicas, most=1), Outcomes()
    for seq in range(6):
        spec = request(seq, [seq], max_tokens=9)
        outcomes.added(spec)
        found.add(spec)
    outcomes.may_abort.add(0)
    finish_all(found, outcomes)
    assert found.num_live == 1
    assert outcomes.finished[0].finish is Finish.ABORT
    assert "2 replicas failed one after the other while they had this request" in outcomes.finished[0].error
    assert "was killed by SIGSEGV" in outcomes.finished[0].error
    assert all(outcomes.finished[seq].finish is Finish.LENGTH for seq in range(1, 6))


def test_a_request_that_comes_on_between_deaths_is_not_blamed() -> None:
    replicas = [FakeReplica(number) for number in range(4)]
    found, outcomes = replica_set(replicas), Outcomes()
    spec = request(0, [1], max_tokens=80)
    outcomes.added(spec)
    found.add(spec)
    for length in (20, 40, 60):
        while len(outcomes.tokens[0]) < length:
            outcomes.take(found.updates(0))
        next(replica for replica in replicas if 0 in replica.held and not replica.dead).dead = "was killed"
    finish_all(found, outcomes)
    assert outcomes.finished[0].finish is Finish.LENGTH


def prompt_logprobs(start: int, count: int) -> PromptLogprobs:
    return PromptLogprobs(start, tuple(TokenLogprobs(float(start + i), 1, (), ()) for i in range(count)))


@pytest.mark.parametrize("reported", [0, 2, 4])
def test_log_probabilities_of_a_prompt_are_given_once(reported: int) -> None:
    replicas = [Scripted(number) for number in range(2)]
    found = replica_set(replicas)
    spec = request(0, [1, 2, 3, 4, 5])
    found.add(replace_fields(spec, sampling=replace_fields(spec.sampling, prompt_logprobs=1)))
    first, second = sorted(replicas, key=lambda replica: 0 not in replica.held)
    if reported:
        first.script = [[SeqUpdate(0, (), prompt_logprobs=prompt_logprobs(1, reported), cached_tokens=3)]]
    got = found.updates(0)
    first.dead = "died"
    found.updates(0)
    (again,) = second.added
    assert again.sampling.prompt_logprobs == (-1 if reported == 4 else 1)
    second.script = [[SeqUpdate(0, (9,), prompt_logprobs=None if reported == 4 else prompt_logprobs(1, 4))]]
    got += found.updates(0)
    entries = [each for update in got if update.prompt_logprobs for each in update.prompt_logprobs.entries]
    assert [entry.chosen for entry in entries] == [1.0, 2.0, 3.0, 4.0]
    assert got[-1].cached_tokens == (3 if reported else 0)


def test_what_a_replica_says_of_a_request_that_is_elsewhere_is_dropped() -> None:
    replicas = [Scripted(number) for number in range(2)]
    found = replica_set(replicas)
    found.add(request(0, [1]))
    other = next(replica for replica in replicas if 0 not in replica.held)
    other.script = [[SeqUpdate(0, (5,)), SeqUpdate(77, (5,), finish=Finish.STOP)]]
    assert found.updates(0) == []


def test_a_request_that_waits_is_aborted_here() -> None:
    replica = FakeReplica(0)
    found = replica_set([replica], most=1)
    for seq in range(3):
        found.add(request(seq, [seq], max_tokens=50))
    found.abort([2])
    assert found.updates(0) == [SeqUpdate(2, (), finish=Finish.ABORT)]
    assert found.stats().waiting == 1
    with pytest.raises(RequestError, match="request 1 exists already"):
        found.add(request(1, [1]))


def test_closed() -> None:
    closed = []
    found = replica_set([FakeReplica(0)], on_close=lambda: closed.append(1))
    found.close()
    found.close()
    with pytest.raises(ClosedError, match="was closed"):
        found.updates(0)
    assert closed


def test_stats_are_sums_with_all_ranks_numbered_through() -> None:
    rank = RankStats(0, 1, 2, 3, 4, 5)
    one = replace_fields(
        STATS, num_blocks=10, block_size=16, max_model_len=64, steps=3, start_s=(("load", 1.0),), ranks=(rank, rank)
    )
    two = replace_fields(one, num_blocks=12, max_model_len=32, steps=4, start_s=(("load", 2.0),), ranks=(rank,))
    both = merged([one, two])
    assert (both.num_blocks, both.block_size, both.max_model_len, both.steps) == (22, 16, 32, 7)
    assert both.start_s == (("load", 2.0),)
    assert [each.rank for each in both.ranks] == [0, 1, 2]
    assert both.replicas == (one, two)
    assert from_engine.decode(encode(both)) == both
