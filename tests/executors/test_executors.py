"""The executors: they give the same tokens, and their errors say what happened."""

import gc
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from shoal import LLM, SamplingParams
from shoal.errors import ClosedError, ConfigError, EngineError, RankFailed, RanksDied, UserError
from shoal.executors.base import RankExecutor
from shoal.models.decoder import Decoder
from shoal.wire.base import encode, replace_fields
from shoal.wire.ranks import (
    Capacity,
    FromRank,
    LoadInfo,
    RankCall,
    RankReply,
    RankReport,
    RankSetup,
    StepMask,
    StepPlan,
    StepResult,
    StepTimes,
    ToRank,
)
from shoal.worker.runner import Runner
from support.fakes import FakeClock, this_rank
from support.plans import bare_plan, bare_rank, setup_of

SMALL: dict[str, Any] = {"kv_cache_memory_bytes": "2MiB", "max_model_len": 64}
PROMPTS: list[Any] = [{"prompt_token_ids": [3 + 7 * i, 5, 200 - i, 9][: 1 + i % 4]} for i in range(5)]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
DRAWN = SamplingParams(temperature=0.8, top_p=0.9, top_k=50, seed=11, max_tokens=8, ignore_eos=True)


def tokens(llm: LLM) -> list[tuple[int, ...]]:
    params = [GREEDY, DRAWN, GREEDY, DRAWN, GREEDY]
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params, use_tqdm=False)]


@pytest.fixture(scope="module")
def folder(checkpoint: Callable[[str], Path]) -> str:
    return str(checkpoint("llama"))


@pytest.fixture(scope="module")
def expected(folder: str) -> list[tuple[int, ...]]:
    with LLM(folder, distributed_executor_backend="uni", **SMALL) as llm:
        found = tokens(llm)
    assert len({found[0], found[2], found[4]}) == 3
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "ranks"), [("threads", 1), ("threads", 2), ("threads", 3), ("mp", 1), ("mp", 2)])
def test_all_executors_give_the_same_tokens(
    folder: str, expected: list[tuple[int, ...]], backend: str, ranks: int
) -> None:
    with LLM(folder, distributed_executor_backend=backend, tensor_parallel_size=ranks, **SMALL) as llm:
        assert tokens(llm) == expected
        stats = llm.stats()
        assert [rank.rank for rank in stats.ranks] == list(range(ranks))
        assert len({rank.pid for rank in stats.ranks}) == (ranks if backend == "mp" else 1)


def test_uni_refuses_two_ranks(folder: str) -> None:
    with pytest.raises(ConfigError, match="uni runs one rank, not 2: use mp or threads"):
        LLM(folder, distributed_executor_backend="uni", tensor_parallel_size=2, **SMALL)


# --- threads -----------------------------------------------------------------------------------------------------


def rank_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("shoal-rank-")]


def wait_for(done: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not done() and time.monotonic() < deadline:
        time.sleep(0.01)
    return done()


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_an_error_of_a_rank_in_a_step(folder: str, monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    """The last rank fails. The others wait for it, and their wait is ended."""
    execute = Runner.execute
    with LLM(folder, distributed_executor_backend="threads", tensor_parallel_size=ranks, **SMALL) as llm:
        bad = ranks - 1
        failing = threading.Event()

        def broken(self: Runner, plan: StepPlan) -> StepResult | None:
            if this_rank() == bad and failing.is_set():
                raise ArithmeticError("the sum is wrong\nand more of it")
            return execute(self, plan)

        monkeypatch.setattr(Runner, "execute", broken)
        long = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        run = llm.run([llm.prepare(0, PROMPTS[0], GREEDY), llm.prepare(1, PROMPTS[1], long)])
        next(run)
        failing.set()
        begun = time.monotonic()
        with pytest.raises(RankFailed) as caught:
            list(run)
        assert time.monotonic() - begun < 10
        message = str(caught.value)
        assert message.startswith(f"rank {bad} (thread shoal-rank-{bad}, after step ")
        assert message.endswith("ArithmeticError: the sum is wrong")
        assert wait_for(lambda: not rank_threads(), 5)
        with pytest.raises(ClosedError, match="the sum is wrong"):
            llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        with pytest.raises(ClosedError):
            llm.stats()


def test_an_error_of_a_rank_at_the_start(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from shoal.worker.worker import Worker

    handle = Worker.handle

    def broken(self: Worker, message: StepPlan | StepMask | RankCall) -> StepResult | RankReply | None:
        if isinstance(message, RankCall) and message.verb == "load" and self.setup.rank == 1:
            raise RuntimeError("no room")
        return handle(self, message)

    monkeypatch.setattr(Worker, "handle", broken)
    with pytest.raises(RankFailed, match=r"rank 1 \(thread .*: RuntimeError: no room"):
        LLM(folder, distributed_executor_backend="threads", tensor_parallel_size=2, **SMALL)
    assert wait_for(lambda: not rank_threads(), 5)


@pytest.mark.slow
def test_a_step_that_takes_too_long(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    execute, released = Runner.execute, threading.Event()
    llm = LLM(folder, distributed_executor_backend="threads", tensor_parallel_size=2, step_timeout=1, **SMALL)
    try:

        def slow(self: Runner, plan: StepPlan) -> StepResult | None:
            if this_rank() == 1:
                released.wait(30)
            return execute(self, plan)

        monkeypatch.setattr(Runner, "execute", slow)
        threading.Timer(3.0, released.set).start()
        with pytest.raises(RankFailed) as caught:
            llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    finally:
        released.set()
        llm.close()
    message = str(caught.value)
    assert message.startswith("step 0 did not finish within 1 s (--step-timeout): ")
    assert "rank 0 (thread shoal-rank-0" in message
    assert "all_reduce" in message
    assert "rank 1 (thread shoal-rank-1" in message
    assert wait_for(lambda: not rank_threads(), 5)


# --- the common part ---------------------------------------------------------------------------------------------


class FakeLinks:
    """Links to two fake ranks. `answers` returns their answers to a message."""

    def __init__(self, answers: Callable[[ToRank], Sequence[FromRank]]) -> None:
        self.world_size = 2
        self.closed: list[bool] = []
        self.replaced: list[int] = []
        self.spares_after: list[int] = []  # how many ranks were replaced before each call of `keep_spares`
        self.hanging: list[int] = []
        self.sent: list[ToRank] = []
        self.answers = answers
        self._inbox: list[FromRank] = []

    def send(self, message: ToRank, rank: int | None = None) -> None:
        self.sent.append(message)
        self._inbox += self.answers(message)

    def receive(self, timeout: float) -> list[FromRank]:
        if not self._inbox:
            time.sleep(min(timeout, 0.01))
        found, self._inbox = self._inbox, []
        return found

    def replace(self, ranks: Sequence[int]) -> None:
        self.replaced += ranks

    def keep_spares(self) -> None:
        self.spares_after.append(len(self.replaced))

    def stuck(self, seconds: float, step: int) -> list[int]:
        return self.hanging

    def describe(self, rank: int) -> str:
        return f"process 100{rank}"

    def close(self, *, failed: bool) -> None:
        self.closed.append(failed)


PLAN = bare_plan(bare_rank(0, cost_share=0.5), bare_rank(1, cost_share=0.5))
SETUPS = [setup_of(PLAN, rank) for rank in range(2)]


def good_answers(message: ToRank) -> Sequence[FromRank]:
    if not isinstance(message, RankCall):
        return []
    payloads = [b"", b""]
    if message.verb == "load":
        infos = (LoadInfo(rank, "cpu", 0, 1, 1, 1, 0, 1, 1, "", "", "") for rank in range(2))
        payloads = [encode(info) for info in infos]
    if message.verb == "profile":
        payloads = [encode(Capacity(rank, 10 + rank, 1)) for rank in range(2)]
    return [RankReply(message.id, rank, payloads[rank]) for rank in (1, 0)]


def silent_for(verb: str, *ranks: int) -> Callable[[ToRank], Sequence[FromRank]]:
    def answers(message: ToRank) -> Sequence[FromRank]:
        found = good_answers(message)
        if isinstance(message, RankCall) and message.verb == verb:
            return [answer for answer in found if isinstance(answer, RankReply) and answer.rank not in ranks]
        return found

    return answers


def executor(links: FakeLinks, **changes: Any) -> RankExecutor:
    options: dict[str, Any] = {"start_timeout": 5.0, "step_timeout": 0.2, **changes}
    return RankExecutor(links, SETUPS, check_capacity=lambda blocks: None, **options)


@pytest.fixture
def plan() -> StepPlan:
    return StepPlan(0, 7, ())


def test_all_ranks_use_the_smallest_number_of_blocks() -> None:
    links = FakeLinks(good_answers)
    found = executor(links)
    assert found.num_blocks == 10
    told = [m.payload for m in links.sent if isinstance(m, RankCall) and m.verb == "allocate"]
    assert told == [(10).to_bytes(8, "little")]
    assert list(found.start_times) == ["connect", "load", "profile", "allocate", "warm_up"]
    assert links.closed == []


def test_a_start_phase_has_a_deadline() -> None:
    links = FakeLinks(silent_for("profile", 1))
    with pytest.raises(RankFailed, match=r"^profile did not finish within 0.2 s on rank 1 \(process 1001\)$"):
        executor(links, start_timeout=0.2)
    assert links.closed[0] is True


def test_a_call_has_a_deadline() -> None:
    links = FakeLinks(silent_for("stats", 0, 1))
    found = executor(links)
    with pytest.raises(RankFailed, match=r"stats did not finish within 0.1 s on rank 0 \(.*1000\); rank 1 \(.*1001\)$"):
        found.call("stats", timeout=0.1)
    assert links.closed == [True]


def test_a_refused_number_of_blocks_ends_the_start() -> None:
    def refuse(blocks: int) -> None:
        raise ConfigError(f"{blocks} are too few")

    links = FakeLinks(good_answers)
    with pytest.raises(ConfigError, match="10 are too few"):
        RankExecutor(links, SETUPS, check_capacity=refuse, start_timeout=5, step_timeout=5)
    assert links.closed == [True]
    assert not any(isinstance(m, RankCall) and m.verb == "allocate" for m in links.sent)


def test_the_error_of_a_late_step_names_all_ranks(plan: StepPlan) -> None:
    links = FakeLinks(good_answers)
    found = executor(links)
    found.launch(plan)
    with pytest.raises(
        RankFailed, match=r"step 7 did not finish within 0.2 s \(--step-timeout\): rank 0 \(.*; rank 1 \("
    ):
        found.poll(5)
    assert links.closed == [True]


def test_after_a_failure_every_call_is_refused(plan: StepPlan) -> None:
    """After any failed call the links are closed, and every later call raises an error with the reason."""
    links = FakeLinks(silent_for("stats", 0))
    found = executor(links)
    with pytest.raises(RankFailed):
        found.call("stats", timeout=0.05)
    count = len(links.sent)
    for call in (lambda: found.launch(plan), lambda: found.poll(0), lambda: found.call("stats", timeout=1)):
        with pytest.raises(ClosedError, match="the engine has failed: stats did not finish"):
            call()
    assert len(links.sent) == count


def reporting(*reports: RankReport) -> Callable[[ToRank], Sequence[FromRank]]:
    return lambda message: reports if isinstance(message, StepPlan) else good_answers(message)


def test_the_error_is_that_of_the_rank_at_fault(plan: StepPlan) -> None:
    """It is not the error of the rank that first noticed that it had lost contact."""
    lost = RankReport(0, 6, "all_reduce was aborted", communication=True)
    found = executor(FakeLinks(reporting(lost, RankReport(1, 6, "out of memory"))))
    found.launch(plan)
    with pytest.raises(RankFailed, match=r"^rank 1 \(process 1001\): out of memory$"):
        found.poll(5)


def test_lost_contact_is_the_error_if_there_is_no_better_one(plan: StepPlan) -> None:
    found = executor(FakeLinks(reporting(RankReport(0, 6, "all_reduce waited 5 s", communication=True))))
    found.launch(plan)
    with pytest.raises(EngineError, match=r"^rank 0 \(process 1000\): all_reduce waited 5 s$"):
        found.poll(5)


def test_a_user_error_of_a_rank_is_a_user_error(plan: StepPlan) -> None:
    links = FakeLinks(reporting(RankReport(0, 6, "lower it", user_error=True)))
    found = executor(links)
    found.launch(plan)
    with pytest.raises(UserError, match=r"^lower it$"):
        found.poll(5)
    assert links.closed == [True]
    with pytest.raises(ClosedError, match="lower it"):
        found.poll(5)


class ScriptedLinks(FakeLinks):
    """Links with a script of messages. Once there is a script, each `receive` takes its whole timeout on the clock."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(good_answers)
        self.clock = clock
        self.script: list[Sequence[FromRank]] | None = None

    def send(self, message: ToRank, rank: int | None = None) -> None:
        if self.script is None:
            super().send(message, rank)

    def receive(self, timeout: float) -> list[FromRank]:
        if self.script is None:
            return super().receive(timeout)
        self.clock.now += timeout
        return list(self.script.pop(0)) if self.script else []


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> tuple[ScriptedLinks, RankExecutor]:
    clock = FakeClock()
    monkeypatch.setattr("shoal.executors.base.time.monotonic", clock)
    links = ScriptedLinks(clock)
    found = executor(links, step_timeout=20.0)
    links.script = []
    return links, found


def test_the_deadline_of_a_call_begins_after_earlier_steps(
    scripted: tuple[ScriptedLinks, RankExecutor], plan: StepPlan
) -> None:
    links, found = scripted
    result = StepResult(0, 7, (), StepTimes(1, 1))
    replies = [RankReply(6, rank, b"fine") for rank in range(2)]  # five calls were made at start
    links.script = [*[[]] * 10, [result], replies]
    found.launch(plan)
    assert found.call("stats", timeout=2.0) == [b"fine", b"fine"]  # five seconds later
    assert found.poll(0) == [result]


def test_the_deadline_of_a_step_begins_again_after_an_absence(
    scripted: tuple[ScriptedLinks, RankExecutor], plan: StepPlan
) -> None:
    """The process may have been stopped and continued, or the caller may have been busy between two outputs."""
    links, found = scripted
    found.launch(plan)
    links.clock.now += 1000.0
    assert found.poll(1.0) == []
    with pytest.raises(RankFailed, match=r"step 7 did not finish within 20 s"):
        found.poll(60.0)


# --- the replacement of ranks --------------------------------------------------------------------------------------


class DyingLinks(FakeLinks):
    """Links whose ranks die when a test says so."""

    def __init__(self) -> None:
        super().__init__(good_answers)
        self.dead: list[int] = []
        self.inbox: list[FromRank] = []

    def receive(self, timeout: float) -> list[FromRank]:
        if self.dead:
            raise RanksDied(f"rank {self.dead[0]} was killed", self.dead)
        found, self.inbox = self.inbox, []
        return found + super().receive(timeout)

    def replace(self, ranks: Sequence[int]) -> None:
        super().replace(ranks)
        self.dead = []


def died(links: DyingLinks, found: RankExecutor, rank: int) -> None:
    """Have a rank die, and the executor notice it."""
    links.dead = [rank]
    with pytest.raises(RanksDied, match=rf"^rank {rank} was killed$"):
        found.poll(0)
    links.sent.clear()


def test_a_rank_is_replaced_and_all_run_the_start_phases_again(plan: StepPlan) -> None:
    links = DyingLinks()
    found = executor(links)
    found.launch(plan)
    died(links, found, 1)
    for call in (lambda: found.launch(plan), lambda: found.poll(0), lambda: found.call("stats", timeout=1)):
        with pytest.raises(RanksDied):
            call()
    found.reform(5, ())
    assert found.reforming
    while found.reforming:
        assert found.poll(0.1) == []
    assert links.replaced == [1]
    setups = [each for each in links.sent if isinstance(each, RankSetup)]
    assert [(each.rank, each.incarnation, each.num_blocks) for each in setups] == [(0, 5, 10), (1, 5, 10)]
    verbs = [each.verb for each in links.sent if isinstance(each, RankCall)]
    assert verbs == ["connect", "load", "allocate", "warm_up"]
    assert links.spares_after == [0, 1]  # when the ranks can compute, and not before
    assert links.closed == []


def test_ranks_that_sleep_are_replaced_by_ranks_that_sleep() -> None:
    links = DyingLinks()
    found = executor(links)
    died(links, found, 0)
    found.reform(1, ("weights", "kv_cache"))
    while found.reforming:
        found.poll(0.1)
    calls = [(each.verb, each.payload) for each in links.sent if isinstance(each, RankCall)]
    assert calls == [("connect", b""), ("sleep", b"weights,kv_cache")]


def test_what_ranks_said_before_a_replacement_is_dropped(plan: StepPlan) -> None:
    links = DyingLinks()
    found = executor(links)
    found.launch(plan)
    died(links, found, 1)
    found.reform(1, ())
    links.inbox = [
        StepResult(0, 7, (), StepTimes(1, 1)),
        RankReport(0, 6, "all_reduce was aborted", communication=True, incarnation=0),
        RankReply(5, 0, b"of the call before"),
    ]
    while found.reforming:
        found.poll(0.1)
    links.inbox = [StepResult(0, 7, (), StepTimes(1, 1)), result := StepResult(1, 8, (), StepTimes(1, 1))]
    found.launch(replace_fields(plan, incarnation=1, step=8))
    assert found.poll(1) == [result]


def test_a_rank_that_raises_is_not_replaced_even_if_another_has_died(plan: StepPlan) -> None:
    links = DyingLinks()
    found = executor(links)
    died(links, found, 1)
    found.reform(1, ())
    links.inbox = [RankReport(0, 6, "out of memory", incarnation=1)]
    with pytest.raises(RankFailed, match=r"^rank 0 \(process 1000\): out of memory$") as caught:
        found.poll(1)
    assert not isinstance(caught.value, RanksDied)
    assert links.closed == [True]


def test_a_rank_that_hangs_counts_as_dead(scripted: tuple[ScriptedLinks, RankExecutor], plan: StepPlan) -> None:
    """Only once a step takes far longer than steps like it, and not a rank that waits for another."""
    links, found = scripted
    found.launch(plan)
    links.script = [[StepResult(0, 7, (), StepTimes(1, 1))]]
    assert len(found.poll(1.0)) == 1  # it took half a second: ten times as much is allowed
    found.launch(plan)
    links.hanging = [1]
    assert found.poll(4.0) == []
    with pytest.raises(RanksDied) as caught:
        found.poll(4.0)
    says = "rank 1 (process 1001) does nothing in step 7 (steps like it took 0.50 s at most); rank 0 waits for that"
    assert (str(caught.value), caught.value.ranks) == (says, (1,))
    assert links.closed == []


def test_a_rank_that_hangs_in_an_answered_step_is_found_by_the_next_call(
    scripted: tuple[ScriptedLinks, RankExecutor], plan: StepPlan
) -> None:
    """Only one rank answers a step: another may hang after the last exchange, and then answers no call either."""
    links, found = scripted
    found.launch(plan)
    links.script = [[StepResult(0, 7, (), StepTimes(1, 1))]]
    assert len(found.poll(1.0)) == 1
    links.hanging = [1]
    begun = links.clock.now
    with pytest.raises(RanksDied, match=r"^rank 1 \(process 1001\) does nothing in step 7 ") as caught:
        found.call("stats", timeout=60.0)
    assert caught.value.ranks == (1,)
    assert links.clock.now - begun < 6.0
    assert links.closed == []


def test_a_rank_that_dies_while_all_start_ends_the_executor() -> None:
    links = DyingLinks()
    links.dead = [0]
    with pytest.raises(RankFailed, match="rank 0 was killed") as caught:
        executor(links)
    assert not isinstance(caught.value, RanksDied)
    assert links.closed[0] is True


class FakePeers:
    """Replicas whose ranks form groups with those of the executor. One of them loses a rank after some checks."""

    def __init__(self, checks: int = 0, *, all_awake: bool = True) -> None:
        self.checks = checks
        self.all_awake = all_awake
        self.questions_until_ready = 3

    def check(self) -> None:
        self.checks -= 1
        if self.checks == 0:
            raise RanksDied("replica 1: rank 0 was killed", ())

    def formed(self) -> bool:
        self.questions_until_ready -= 1
        return self.questions_until_ready <= 0


def test_a_rank_that_has_lost_contact_waits_for_the_death_of_a_rank_elsewhere(plan: StepPlan) -> None:
    """It is told by the engine of the other replica, perhaps much later than the connection has ended."""
    links, peers = DyingLinks(), FakePeers()
    found = executor(links, peers=peers)
    found.launch(plan)
    links.inbox = [RankReport(0, 6, "connection closed", communication=True)]
    peers.checks = 5
    with pytest.raises(RanksDied, match=r"^replica 1: rank 0 was killed$"):
        found.poll(1)
    found.reform(1, ())
    while found.reforming:
        found.poll(0.1)
    assert links.replaced == []
    assert peers.questions_until_ready == 0, "it has waited until all are ready"


def test_a_death_elsewhere_ends_a_call_to_ranks_that_wait_for_it(plan: StepPlan) -> None:
    links, peers = DyingLinks(), FakePeers()
    found = executor(links, peers=peers, step_timeout=60)
    found.launch(plan)
    links.answers = silent_for("stats", 1)
    peers.checks = 3
    with pytest.raises(RanksDied, match="replica 1"):
        found.call("stats", timeout=60)


def test_a_death_elsewhere_while_all_start_ends_the_executor() -> None:
    links = DyingLinks()
    with pytest.raises(RankFailed, match=r"^replica 1: rank 0 was killed$") as caught:
        executor(links, peers=FakePeers(3))
    assert not isinstance(caught.value, RanksDied)
    assert links.closed[0] is True


def test_ranks_do_not_warm_up_together_with_ranks_that_sleep() -> None:
    links = DyingLinks()
    found = executor(links, peers=FakePeers(all_awake=False))
    died(links, found, 1)
    found.reform(1, ())
    while found.reforming:
        found.poll(0.1)
    assert [each.verb for each in links.sent if isinstance(each, RankCall)] == ["connect", "load", "allocate"]


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "ranks"), [("uni", 1), ("threads", 2)])
def test_closing_drops_weights_and_cache(folder: str, backend: str, ranks: int) -> None:
    def models() -> int:
        gc.collect()
        return sum(type(each) is Decoder for each in gc.get_objects())

    before = models()
    llm = LLM(folder, tensor_parallel_size=ranks, distributed_executor_backend=backend, kv_cache_memory_bytes=2**20)
    assert models() == before + ranks
    llm.close()
    assert models() == before
