"""Offline runs with a fake engine."""

import itertools
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from shoal.activity import Activity
from shoal.errors import ClosedError, ReplicasFailed
from shoal.llm.offline import OfflineRunner
from shoal.llm.request_builder import RequestBuilder
from shoal.llm.shared_engine import SharedEngine
from shoal.outputs import RequestOutput
from shoal.params import SamplingParams
from shoal.text.prompts import Job, RefusedPrompt
from shoal.wire.base import encode
from shoal.wire.engine import EngineRequest, EngineStats, Finish, ResetOutcome, SeqUpdate, to_engine
from shoal.wire.ranks import Sampling, SamplingPenalties
from shoal.wire.tokens import decode_tokens, encode_numbers, encode_tokens, token_set
from shoal.wire.trace import TraceEvents
from support.fakes import on_threads
from support.letters import Letters

EOS = 2
MAX_MODEL_LEN = 50
WINDOW = 1024
MOST = 2**31 - 1


class FakeEngine:
    """An engine that gives each request one letter in each step: the letters that follow the last one of its prompt.

    Requests whose prompt begins with `slow` get nothing while others run. With `late`, an aborted request gets one more
    letter, as if it came from an engine in another process.
    """

    def __init__(self, *, slow: int | None = None, late: bool = False) -> None:
        self.requests: dict[int, EngineRequest] = {}
        self.running: dict[int, int] = {}  # request -> number of letters so far
        self.aborted: list[int] = []
        self.most = 0
        self._slow = slow
        self._late: list[SeqUpdate] = []
        self._with_late = late

    def add(self, request: EngineRequest) -> None:
        assert request.seq not in self.requests
        self.requests[request.seq] = request
        self.running[request.seq] = 0
        self.most = max(self.most, len(self.running))

    def abort(self, seqs: Sequence[int]) -> None:
        for seq in seqs:
            if self.running.pop(seq, None) is not None:
                self.aborted.append(seq)
                if self._with_late:
                    self._late += [SeqUpdate(seq, (ord("?"),)), SeqUpdate(seq, (), finish=Finish.ABORT)]

    def updates(self, timeout: float) -> list[SeqUpdate]:
        quick = [seq for seq in self.running if decode_tokens(self.requests[seq].tokens)[0] != self._slow]
        late, self._late = self._late, []
        return [*late, *(self._step(seq) for seq in quick or list(self.running))]

    def _step(self, seq: int) -> SeqUpdate:
        request = self.requests[seq]
        self.running[seq] += 1
        count = self.running[seq]
        token = decode_tokens(request.tokens)[-1] + count
        finish = Finish.LENGTH if count == request.max_tokens else None
        finish = Finish.STOP if token in token_set(request.stop_ids) else finish
        if finish is not None:
            del self.running[seq]
        return SeqUpdate(seq, (token,), finish=finish)

    def stats(self) -> EngineStats:
        raise NotImplementedError

    def set_activity(self, activity: Activity) -> None:
        raise NotImplementedError

    def reset_prefix_cache(self, *, running: bool = False) -> ResetOutcome:
        raise NotImplementedError

    def begin_trace(self, limit: int) -> None:
        raise NotImplementedError

    def take_trace(self) -> list[TraceEvents]:
        raise NotImplementedError

    def end_trace(self) -> list[TraceEvents]:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


def runner(engine: FakeEngine, *, seed: int = 0, letters: bool = True) -> OfflineRunner:
    return OfflineRunner(
        SharedEngine(engine), Letters() if letters else None, eos=[EOS], max_model_len=MAX_MODEL_LEN, seed=seed
    )


def job(index: int, max_tokens: int | None = 3, prompt: str = "a", **params: Any) -> Job:
    return Job(index, prompt, tuple(map(ord, prompt)), SamplingParams(max_tokens=max_tokens, **params))


def texts(outputs: Iterable[tuple[int, RequestOutput]]) -> dict[int, str]:
    found = {}
    for index, output in outputs:
        assert output.request_id == str(index)
        assert output.finished
        found[index] = output.outputs[0].text
    return found


def request_of(params: SamplingParams, *, prompt: str = "a", **job_fields: Any) -> EngineRequest:
    engine = FakeEngine()
    list(runner(engine).run([Job(0, None, tuple(map(ord, prompt)), params, **job_fields)]))
    return engine.requests[0]


# --- outputs -----------------------------------------------------------------------------------------------------


def test_outputs_are_yielded_as_they_finish_or_in_order() -> None:
    jobs = [job(0, 4), job(1, 1), job(2, 3), job(3, 2)]
    assert [index for index, _ in runner(FakeEngine()).run(jobs)] == [1, 3, 2, 0]
    ordered = list(runner(FakeEngine()).run(jobs, ordered=True))
    assert [index for index, _ in ordered] == [0, 1, 2, 3]
    assert texts(ordered) == {0: "bcde", 1: "b", 2: "bcd", 3: "bc"}


def test_an_output_is_yielded_before_the_others_have_finished() -> None:
    engine = FakeEngine()
    run = runner(engine).run([job(0, 40), job(1, 1)])
    assert next(run)[0] == 1
    assert list(engine.running) == [0]


def test_outputs_have_the_indices_of_their_jobs() -> None:
    assert texts(runner(FakeEngine()).run([job(7, 1), job(3, 2)], ordered=True)) == {7: "b", 3: "bc"}


def test_without_jobs_there_are_no_outputs() -> None:
    engine = FakeEngine()
    assert list(runner(engine).run([])) == []
    assert engine.requests == {}


def test_a_refused_prompt_keeps_its_place_and_is_not_sent() -> None:
    refused = RefusedPrompt(1, "x", (5,), "too long")
    jobs: list[Job | RefusedPrompt] = [job(0), refused, job(2, 1)]
    engine = FakeEngine()
    outputs = dict(found := list(runner(engine).run(jobs, ordered=True)))
    assert [index for index, _ in found] == [0, 1, 2]
    assert outputs[1] == RequestOutput("1", "x", (5,), (), error="too long")
    assert len(engine.requests) == 2
    assert [index for index, _ in runner(FakeEngine()).run(jobs)] == [1, 2, 0]


def test_all_prompts_may_be_refused() -> None:
    jobs = [RefusedPrompt(i, None, (), "no") for i in range(2500)]
    for ordered in (False, True):
        assert [index for index, _ in runner(FakeEngine()).run(iter(jobs), ordered=ordered)] == list(range(2500))


def test_outputs_of_one_prompt_are_yielded_together() -> None:
    engine = FakeEngine()
    jobs = [job(0, n=3, prompt_logprobs=1), job(1, 1), job(2, n=2)]
    outputs = dict(runner(engine).run(jobs, ordered=True))
    assert [[each.index for each in outputs[i].outputs] for i in range(3)] == [[0, 1, 2], [0], [0, 1]]
    requests = engine.requests
    assert [requests[seq].group for seq in range(6)] == [0, 0, 0, -1, 4, 4]
    assert [requests[seq].sampling.sample_index for seq in range(6)] == [0, 1, 2, 0, 0, 1]
    assert len({requests[seq].sampling.seed for seq in (0, 1, 2)}) == 1
    assert [requests[seq].sampling.prompt_logprobs for seq in range(3)] == [1, -1, -1], (
        "only the first output asks for them"
    )


def test_an_error_of_a_request_is_in_its_output() -> None:
    class Failing(FakeEngine):
        def _step(self, seq: int) -> SeqUpdate:
            del self.running[seq]
            return SeqUpdate(seq, (), finish=Finish.ABORT, error="no way")

    ((_, output),) = runner(Failing()).run([job(0)])
    assert output.error == "no way"
    assert output.outputs[0].finish_reason == "abort"


# --- stop texts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True])
def test_a_stop_text_aborts_the_request_in_the_engine(late: bool) -> None:
    """Later updates of the request are ignored."""
    engine = FakeEngine(late=late)
    outputs = dict(runner(engine).run([job(0, 9, stop=["cd"]), job(1, 9)]))
    assert outputs[0].outputs[0].text == "b"
    assert outputs[0].outputs[0].token_ids == tuple(map(ord, "bcd"))
    assert (outputs[0].outputs[0].finish_reason, outputs[0].outputs[0].stop_reason) == ("stop", "cd")
    assert engine.aborted == [0]
    assert outputs[1].outputs[0].text == "bcdefghij"


def test_a_stop_text_at_the_end_needs_no_abort() -> None:
    engine = FakeEngine()
    ((_, output),) = runner(engine).run([job(0, 3, stop=["cd"])])
    assert output.outputs[0].finish_reason == "stop"
    assert engine.aborted == []


def test_each_output_of_a_prompt_stops_at_its_own_stop_text() -> None:
    """The other outputs of the prompt go on."""

    class Apart(FakeEngine):
        def _step(self, seq: int) -> SeqUpdate:
            update = super()._step(seq)
            return SeqUpdate(seq, (update.tokens[0] + seq,), finish=update.finish)

    engine = Apart()
    ((_, output),) = runner(engine).run([job(0, 4, n=3, stop="d")])
    assert [each.text for each in output.outputs] == ["bc", "c", ""]
    assert [each.stop_reason for each in output.outputs] == ["d", "d", "d"]
    assert engine.aborted == [2, 1, 0]


# --- the window --------------------------------------------------------------------------------------------------


class Source:
    """A source of jobs that counts how many are taken."""

    def __init__(self, jobs: Iterable[Job | RefusedPrompt]) -> None:
        self.taken = 0
        self._jobs = iter(jobs)

    def __iter__(self) -> Iterator[Job | RefusedPrompt]:
        for each in self._jobs:
            self.taken += 1
            yield each


def test_outputs_are_yielded_before_the_window_is_full() -> None:
    """The first outputs do not wait for jobs that the source has not given yet."""
    source = Source(job(i, 1) for i in itertools.count())
    next(iter(runner(FakeEngine()).run(source)))
    assert source.taken < WINDOW / 4


@pytest.mark.parametrize("ordered", [False, True])
def test_no_more_jobs_are_taken_than_the_window_allows(ordered: bool) -> None:
    engine, source = FakeEngine(), Source(job(i, 1 + i % 3) for i in itertools.count())
    run = runner(engine).run(source, ordered=ordered)
    for given, _ in enumerate(itertools.islice(run, 3000), 1):
        assert source.taken <= given + WINDOW
    assert engine.most <= WINDOW


def test_in_order_a_slow_first_job_holds_the_others_back() -> None:
    engine = FakeEngine(slow=ord("z"))
    source = Source(job(i, 1, "a" if i else "z") for i in range(3000))
    run = runner(engine).run(source, ordered=True)
    assert next(run)[0] == 0
    assert source.taken == WINDOW, "outputs that wait for the first one count in the window"
    assert [index for index, _ in run] == list(range(1, 3000))


def test_out_of_order_a_slow_job_does_not_hold_others_back() -> None:
    engine = FakeEngine(slow=ord("z"))
    source = (job(i, 1, "a" if i else "z") for i in range(3000))
    assert [index for index, _ in runner(engine).run(source)] == [*range(1, 3000), 0]


def test_each_output_of_a_prompt_counts_in_the_window() -> None:
    """All outputs of a job are begun together, so the last job may exceed the window."""
    engine = FakeEngine()
    count = sum(1 for _ in runner(engine).run(job(i, 1 + i % 2, n=100) for i in range(50)))
    assert count == 50
    assert WINDOW <= engine.most < WINDOW + 100


def test_more_outputs_than_the_window_are_run() -> None:
    engine = FakeEngine()
    ((_, output),) = runner(engine).run([job(0, 1, n=1500)])
    assert len(output.outputs) == 1500


# --- runs that end early, and several runs -----------------------------------------------------------------------


def test_closing_a_run_aborts_only_its_requests() -> None:
    engine = FakeEngine()
    offline = runner(engine)
    first = offline.run([job(0, 1), *(job(i, 30, n=2) for i in range(1, 5))])
    second = offline.run([job(0, 2), job(1, 20)])
    next(first)
    next(second)
    first.close()  # type: ignore[attr-defined]
    assert sorted(engine.aborted) == list(range(1, 9))
    assert list(engine.running) == [10]
    assert len(list(second)) == 1
    assert texts(offline.run([job(5)])) == {5: "bcd"}


def test_an_error_in_the_source_of_jobs_ends_the_run() -> None:
    def jobs() -> Iterator[Job]:
        yield job(0)
        raise KeyError("mine")

    engine = FakeEngine()
    with pytest.raises(KeyError, match="mine"):
        list(runner(engine).run(jobs()))
    assert engine.running == {}


def test_interleaved_runs_get_all_their_outputs() -> None:
    """The run that asks the engine first gets the updates of the other runs too."""
    offline = runner(FakeEngine())
    runs = [
        offline.run([job(i, 1 + (i * k) % 5, prompt=chr(96 + k)) for i in range(6)], ordered=k == 2) for k in (1, 2, 3)
    ]
    found: list[list[tuple[int, RequestOutput]]] = [[], [], []]
    for turn in range(6):
        for which in ([0, 1, 2], [2, 0, 1])[turn % 2]:
            found[which].append(next(runs[which]))
    for k, outputs in enumerate(found, 1):
        expected = {i: "".join(chr(97 + k + j) for j in range(1 + (i * k) % 5)) for i in range(6)}
        assert texts(outputs) == expected
    assert [index for index, _ in found[1]] == list(range(6))
    assert all(next(run, None) is None for run in runs)


# --- requests ----------------------------------------------------------------------------------------------------


def test_plain_parameters_make_a_plain_request() -> None:
    request = request_of(SamplingParams(temperature=0, max_tokens=5))
    assert decode_tokens(request.tokens) == [ord("a")]
    assert (request.max_tokens, request.stop_ids, request.group, request.grammar) == (5, encode_tokens([EOS]), -1, "")
    assert request.sampling == Sampling(seed=request.sampling.seed)


def test_every_parameter_reaches_the_engine() -> None:
    params = SamplingParams(
        temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, presence_penalty=0.5, frequency_penalty=-0.5,
        repetition_penalty=1.5, seed=-2, max_tokens=9, min_tokens=4, stop_token_ids=[60], logprobs=3, prompt_logprobs=2,
        logit_bias={5: 1.5}, allowed_token_ids=[98, 99],
    )  # fmt: skip
    request = request_of(params, banned=((7,), (8, 9)), grammar="g")
    assert request.grammar == "g"
    assert request.stop_ids == encode_tokens([60, EOS])
    assert request.sampling == Sampling(
        seed=2**64 - 2, temperature=0.5, top_k=7, top_p=0.9, min_p=0.1, penalties=SamplingPenalties(0.5, -0.5, 1.5),
        min_tokens=4, ends=encode_tokens([60, EOS]), bias_ids=encode_tokens([5]), bias_values=encode_numbers([1.5]),
        allowed=encode_tokens([98, 99]), banned=((7,), (8, 9)), logprobs=3,
        prompt_logprobs=2,
    )  # fmt: skip
    assert to_engine.decode(encode(request)) == request


def test_numbers_of_any_size_fit_the_wire() -> None:
    huge = 10**30
    params = SamplingParams(
        top_k=huge, seed=huge, max_tokens=huge, min_tokens=huge, logprobs=huge, prompt_logprobs=huge
    )
    request = request_of(params)
    assert to_engine.decode(encode(request)) == request
    assert request.max_tokens == MAX_MODEL_LEN - 1
    found = request.sampling
    assert (found.top_k, found.min_tokens, found.logprobs, found.prompt_logprobs) == (MOST, MOST, MOST, MOST)
    assert found.seed == huge % 2**64


@pytest.mark.parametrize(("given", "top_k", "count"), [(-1, 0, MOST), (0, 0, 0), (5, 5, 5)])
def test_special_values_mean_all_tokens(given: int, top_k: int, count: int) -> None:
    sampling = request_of(SamplingParams(top_k=given, logprobs=given)).sampling
    assert (sampling.top_k, sampling.logprobs, sampling.prompt_logprobs) == (top_k, count, -1)


@pytest.mark.parametrize("max_tokens", [None, 1000])
def test_max_tokens_is_cut_to_the_context_length(max_tokens: int | None) -> None:
    request = request_of(SamplingParams(max_tokens=max_tokens), prompt="a" * 40)
    assert request.max_tokens == 10


def test_with_ignore_eos_the_end_of_text_token_is_no_stop_token() -> None:
    request = request_of(SamplingParams(ignore_eos=True, stop_token_ids=[60], min_tokens=2))
    assert request.stop_ids == request.sampling.ends == encode_tokens([60])


def test_jobs_without_a_seed_get_seeds_that_later_runs_repeat() -> None:
    def seeds(seed: int) -> list[int]:
        engine = FakeEngine()
        list(runner(engine, seed=seed).run([job(i, n=2) for i in range(4)]))
        return [engine.requests[2 * i].sampling.seed for i in range(4)]

    assert len(set(seeds(0))) == 4
    assert seeds(0) == seeds(0)
    assert not set(seeds(0)) & set(seeds(1))


def test_without_a_tokenizer_outputs_have_tokens_only() -> None:
    ((_, output),) = runner(FakeEngine(), letters=False).run([job(0)])
    assert (output.outputs[0].text, output.outputs[0].token_ids) == ("", (98, 99, 100))


# --- several threads ---------------------------------------------------------------------------------------------


class WatchedEngine(FakeEngine):
    """An engine that counts how often two threads use it at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self._inside = threading.Lock()
        self.at_once = 0

    def updates(self, timeout: float) -> list[SeqUpdate]:
        free = self._inside.acquire(blocking=False)
        self.at_once += not free
        try:
            threading.Event().wait(0.001)  # lets other threads run
            return super().updates(timeout)
        finally:
            if free:
                self._inside.release()


def test_threads_take_turns_and_get_their_own_outputs() -> None:
    engine = WatchedEngine()
    shared = runner(engine)

    def run(thread: int) -> dict[int, str]:
        letter = chr(ord("a") + thread)
        return texts(shared.run([job(i, 3, letter) for i in range(20)]))

    found = on_threads(4, run)
    for thread, outputs in enumerate(found):
        assert outputs == dict.fromkeys(range(20), "".join(chr(ord("a") + thread + i) for i in (1, 2, 3)))
    assert engine.at_once == 0
    assert engine.most > 20  # requests of several threads run together


def test_a_suspended_run_does_not_block_other_threads() -> None:
    shared = runner(FakeEngine())
    run = shared.run([job(0, 1), job(1, 9)])
    assert next(run)[0] == 0
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(lambda: texts(shared.run([job(5, 2)]))).result(timeout=30)
        assert other == {5: "bc"}
    assert texts(run) == {1: "bcdefghij"}


def test_every_run_gets_the_reason_of_an_engine_failure() -> None:
    class Failing(FakeEngine):
        failure: list[Exception] | None = None

        def updates(self, timeout: float) -> list[SeqUpdate]:
            if self.failure is not None:
                raise self.failure.pop() if self.failure else ClosedError("the engine has failed")
            return super().updates(timeout)

    engine = Failing()
    shared = runner(engine)
    runs = [shared.run([job(0, 1), job(1, 40)]) for _ in range(2)]
    assert [next(run)[0] for run in runs] == [0, 0]
    engine.failure = [ReplicasFailed("no replica is left: mine")]
    for run in runs:
        with pytest.raises(ReplicasFailed, match="no replica is left: mine"):
            next(run)


def test_an_interrupt_aborts_all_requests_of_the_run() -> None:
    class Interrupted(FakeEngine):
        interrupts = 1

        def updates(self, timeout: float) -> list[SeqUpdate]:
            for _ in range(2 * self.interrupts):  # the second signal comes immediately after the first
                signal.raise_signal(signal.SIGINT)
            self.interrupts = 0
            return super().updates(timeout)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        engine = Interrupted()
        shared = runner(engine)
        with pytest.raises(KeyboardInterrupt):
            list(shared.run([job(0, 9), job(1, 9)]))
        assert engine.aborted == [0, 1]
        assert texts(shared.run([job(7, 3)])) == {7: "bcd"}
    finally:
        signal.signal(signal.SIGINT, before)


def test_closing_in_another_thread_ends_a_run() -> None:
    class Endless(FakeEngine):
        begun = threading.Event()
        closed = False

        def updates(self, timeout: float) -> list[SeqUpdate]:
            self.begun.set()
            threading.Event().wait(0.001)  # lets other threads run
            return []

        def close(self) -> None:
            self.closed = True

    engine = Endless()
    shared = SharedEngine(engine)
    offline = OfflineRunner(shared, Letters(), eos=[EOS], max_model_len=MAX_MODEL_LEN, seed=0)
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(lambda: list(offline.run([job(0)])))
        assert engine.begun.wait(30)
        shared.close()
        assert engine.closed
        with pytest.raises(ClosedError, match="was closed"):
            run.result(timeout=30)


def test_a_run_that_is_garbage_collected_is_aborted() -> None:
    """Garbage may be collected at any time, even in the middle of a step of another run."""

    class Collecting(FakeEngine):
        forgotten: list[Any]

        def updates(self, timeout: float) -> list[SeqUpdate]:
            self.forgotten.clear()
            return super().updates(timeout)

    engine = Collecting()
    engine.forgotten = []
    shared = runner(engine)
    run = shared.run([job(0, 1), job(1, 40)])
    assert next(run)[0] == 0
    engine.forgotten = [run]
    del run
    assert texts(shared.run([job(7, 3)])) == {7: "bcd"}
    assert engine.aborted == [1]
    assert not engine.running


def test_requests_of_one_prompt_share_long_lists() -> None:
    """All requests hold the same list object, which is encoded only once."""
    params = SamplingParams(
        n=50, stop_token_ids=[60, 61], min_tokens=2, allowed_token_ids=range(60, 99), logit_bias={60: 1.0, 61: 2.0}
    )
    job = Job(0, None, (97,), params)
    first, *others = RequestBuilder((EOS,), max_model_len=MAX_MODEL_LEN, seed=0).build(job, 0)
    assert [each.sampling.sample_index for each in (first, *others)] == list(range(50))
    for each in others:
        assert each.tokens is first.tokens
        assert each.stop_ids is each.sampling.ends is first.stop_ids
        for name in ("bias_ids", "bias_values", "allowed"):
            assert getattr(each.sampling, name) is getattr(first.sampling, name)
