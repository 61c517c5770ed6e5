"""`AsyncLLM` with a fake line to a fleet, and with real engines, some of which are killed."""

import asyncio
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from shoal.cluster.fleet_connections import FleetMessage
from shoal.errors import (
    ClosedError,
    EngineError,
    Overdue,
    QueueFull,
    RequestError,
    ShoalError,
    Unavailable,
    UserError,
)
from shoal.launch.hub import BUNDLED
from shoal.launch.open_model import OpenModel, open_model
from shoal.llm import outputs
from shoal.llm.async_llm import AsyncLLM
from shoal.llm.deltas import Delta
from shoal.llm.request_stream import RequestStream
from shoal.outputs import RequestOutput
from shoal.params import SamplingParams
from shoal.wire.base import encode
from shoal.wire.engine import Abort, EngineRequest, EngineStats, Finish, RefusalKind, SeqUpdate, Updates
from shoal.wire.fleet import ContextLength, FleetStatus, ReplicaStatus
from shoal.wire.ranks import PromptLogprobs, TokenLogprobs

DEADLINE_S = 120.0
STOP, LENGTH, ABORT = Finish.STOP, Finish.LENGTH, Finish.ABORT
GREEDY = SamplingParams(max_tokens=100, temperature=0.0)


class FakeLine:
    def __init__(self, deliver: Callable[[FleetMessage], object]) -> None:
        self.deliver = deliver
        self.sent: list[EngineRequest | Abort] = []
        self.closed = False
        self.status: FleetStatus | None = None

    def send(self, messages: Sequence[EngineRequest | Abort]) -> None:
        if self.closed:
            raise ClosedError("the engine was closed")
        self.sent += messages

    def ask(self, verb: str, payload: bytes = b"") -> "Future[bytes]":
        found: Future[bytes] = Future()
        if verb == "started":
            found.set_result(b"")
        elif verb == "status" and self.status is not None:
            found.set_result(encode(self.status))
        else:
            found.set_exception(UserError(f"{verb}?"))
        return found

    def close(self) -> None:
        self.closed = True

    @property
    def aborted(self) -> list[int]:
        return [seq for message in self.sent if isinstance(message, Abort) for seq in message.seqs]

    def say(self, *updates: SeqUpdate) -> None:
        """Deliver updates from another thread, as a fleet server does."""
        thread = threading.Thread(target=self.deliver, args=(Updates(updates),))
        thread.start()
        thread.join()


@pytest.fixture(scope="module")
def model() -> OpenModel:
    return open_model(None, {"seed": 0}, online=True)


class Harness:
    def __init__(self, model: OpenModel) -> None:
        self.lines: list[FakeLine] = []
        self.llm = AsyncLLM(model, connect=self._open)

    def _open(self, deliver: Callable[[FleetMessage], object]) -> FakeLine:
        self.lines.append(FakeLine(deliver))
        return self.lines[0]

    @property
    def line(self) -> FakeLine:
        return self.lines[0]

    def tokens(self, text: str) -> tuple[int, ...]:
        assert self.llm.tokenizer is not None
        return tuple(self.llm.tokenizer.encode(text, add_special_tokens=False))

    def stream(self, params: SamplingParams = GREEDY, **options: Any) -> RequestStream:
        return self.llm.stream(self.llm.prepare("Once upon a time", params), **options)


@pytest.fixture
def harness(model: OpenModel) -> Harness:
    return Harness(model)


def run(work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await work

    asyncio.run(bounded())


async def start(work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
    """Start a task, and return it when it waits for the first time."""
    task = asyncio.create_task(work)
    await run_other_tasks()
    return task


async def run_other_tasks() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.01)


async def read(stream: RequestStream, into: list[Delta] | None = None) -> list[Delta]:
    found = [] if into is None else into
    async for deltas in stream:
        found += deltas
    return found


# --- streams ----------------------------------------------------------------------------------------------------


def test_an_error_in_making_a_text_ends_only_its_request(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same delivery contains the tokens and the end of another request, which must not be lost."""
    take = outputs.PromptOutputs.take

    def broken(found: outputs.PromptOutputs, index: int, update: SeqUpdate) -> bool:
        if found.job.params.n == 1:
            return take(found, index, update)
        raise IndexError("piece id is out of range.")

    async def work() -> None:
        bad, good = harness.stream(SamplingParams(n=2)), harness.stream()
        monkeypatch.setattr(outputs.PromptOutputs, "take", broken)
        updates = [SeqUpdate(seq, harness.tokens(" there"), finish=LENGTH) for seq in (0, 2)]
        harness.line.say(*updates)
        (delta,) = await read(good)
        assert (delta.text, delta.finish_reason) == (" there", "length")
        with pytest.raises(EngineError, match="failed to make the text of an output"):
            await read(bad)
        assert sorted(harness.line.aborted) == [0, 1]

    run(work())


def test_unread_deltas_are_merged(harness: Harness) -> None:
    async def work() -> None:
        stream = harness.stream()
        first, second, third = harness.tokens(" there"), harness.tokens(" was a"), harness.tokens(" wolf.")
        harness.line.say(SeqUpdate(0, first, cached_tokens=3))
        harness.line.say(SeqUpdate(0, second, cached_tokens=3))
        await run_other_tasks()
        found = []
        async for (delta,) in stream:
            found.append(delta)
            if len(found) == 1:
                assert stream.cached_tokens == 3
                assert stream.output().outputs[0].finish_reason is None
                harness.line.say(SeqUpdate(0, third, finish=LENGTH, cached_tokens=3))
        assert [delta.text for delta in found] == [" there was a", " wolf."]
        assert [delta.finish_reason for delta in found] == [None, "length"]
        output = stream.output()
        assert output.finished
        assert output.outputs[0].text == " there was a wolf."
        assert output.outputs[0].token_ids == first + second + third
        assert not harness.line.aborted
        assert harness.llm.unfinished == 0

    run(work())


def test_outputs_of_one_prompt_grow_side_by_side(harness: Harness) -> None:
    async def work() -> None:
        stream = harness.stream(SamplingParams(n=3, max_tokens=9))
        requests = [message for message in harness.line.sent if isinstance(message, EngineRequest)]
        assert [(each.seq, each.group, each.sampling.sample_index) for each in requests] == [
            (0, 0, 0),
            (1, 0, 1),
            (2, 0, 2),
        ]
        token = harness.tokens(" wolf")
        harness.line.say(*(SeqUpdate(seq, token, finish=LENGTH if seq == 1 else None) for seq in (2, 1, 0)))
        await run_other_tasks()
        reading = stream.__aiter__()
        assert [(delta.index, delta.finish_reason) for delta in await anext(reading)] == [
            (0, None),
            (1, "length"),
            (2, None),
        ]
        assert [each.finish_reason for each in stream.output().outputs] == [None, "length", None]
        assert not stream.output().finished
        harness.line.say(*(SeqUpdate(seq, token, finish=STOP) for seq in (0, 2)))
        assert [delta.index for delta in await anext(reading)] == [0, 2]
        assert stream.output().finished

    run(work())


def test_a_stop_text_ends_the_request_in_the_fleet(harness: Harness) -> None:
    async def work() -> None:
        stream = harness.stream(SamplingParams(max_tokens=50, stop="a wolf"))
        harness.line.say(SeqUpdate(0, harness.tokens(" There was a wolf in the")))
        harness.line.say(SeqUpdate(0, harness.tokens(" wood")))
        output = await stream.wait()
        assert (output.outputs[0].text, output.outputs[0].stop_reason) == (" There was ", "a wolf")
        assert harness.line.aborted == [0]

    run(work())


@pytest.mark.parametrize(
    ("refusal", "error", "retry"),
    [
        (RefusalKind.INVALID, RequestError, None),
        (RefusalKind.FULL, QueueFull, 1.0),
        (RefusalKind.LATE, Overdue, 5.0),
        (RefusalKind.CLOSING, Unavailable, 10.0),
        (RefusalKind.LOST, Unavailable, 10.0),
        (RefusalKind.FAILED, EngineError, None),
    ],
)
def test_a_refusal_raises_the_error_of_its_kind_after_earlier_deltas(
    harness: Harness, refusal: RefusalKind, error: type[ShoalError], retry: float | None
) -> None:
    async def work() -> None:
        stream = harness.stream(SamplingParams(n=2, max_tokens=9))
        harness.line.say(SeqUpdate(1, harness.tokens(" wolf")))
        harness.line.say(SeqUpdate(0, (), finish=ABORT, error="no more", refusal=refusal))
        await run_other_tasks()
        found: list[Delta] = []
        with pytest.raises(error, match="no more") as caught:
            await read(stream, found)
        assert [delta.text for delta in found] == [" wolf"]
        assert type(caught.value) is error
        assert getattr(caught.value, "retry_after", None) == retry
        assert harness.line.aborted == [1], "the other output of the prompt is aborted"
        assert not stream.output().finished
        with pytest.raises(error):
            await stream.wait()

    run(work())


async def leave(stream: RequestStream) -> None:
    async for _ in stream:
        break


async def fail(stream: RequestStream) -> None:
    with suppress(ZeroDivisionError):
        async for _ in stream:
            raise ZeroDivisionError


@pytest.mark.parametrize("how", [leave, fail])
def test_leaving_the_iteration_early_ends_the_request(
    harness: Harness, how: Callable[[RequestStream], Awaitable[None]]
) -> None:
    async def work() -> None:
        stream = harness.stream()
        harness.line.say(SeqUpdate(0, harness.tokens(" a")))
        await how(stream)
        gc.collect()
        await run_other_tasks()
        assert harness.line.aborted == [0]
        assert harness.llm.unfinished == 0
        harness.line.say(SeqUpdate(0, harness.tokens(" b"), finish=ABORT))  # an update that was on its way
        await run_other_tasks()

    run(work())


@pytest.mark.parametrize("how", [read, RequestStream.wait])
def test_cancelling_the_task_ends_the_request(
    harness: Harness, how: Callable[[RequestStream], Coroutine[Any, Any, Any]]
) -> None:
    async def work() -> None:
        task = await start(how(harness.stream()))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert harness.line.aborted == [0]
        assert harness.llm.unfinished == 0

    run(work())


def test_closing_a_stream_ends_the_iteration_over_it(harness: Harness) -> None:
    async def work() -> None:
        stream = harness.stream()
        task = await start(read(stream))
        stream.close()
        stream.close()
        assert await task == []
        assert harness.line.aborted == [0]

    run(work())


def test_priority_replica_and_deadline_reach_the_fleet(harness: Harness) -> None:
    async def work() -> None:
        harness.stream(priority=3, replica=1, timeout=5.0, arrival=100.0)
        harness.stream()
        first, second = harness.line.sent
        assert isinstance(first, EngineRequest)
        assert isinstance(second, EngineRequest)
        assert (first.priority, first.replica, first.deadline, first.arrival) == (3, 1, 105.0, 100.0)
        assert (second.priority, second.replica, second.deadline) == (0, -1, None)
        assert 0 <= time.monotonic() - second.arrival < DEADLINE_S
        assert first.sampling.seed != second.sampling.seed

    run(work())


def test_a_priority_is_refused_with_first_come_first_served() -> None:
    async def work() -> None:
        harness = Harness(open_model(None, {"scheduling_policy": "fcfs"}, online=True))
        harness.stream(priority=0)
        for priority in (1, -1):
            with pytest.raises(RequestError, match="priority must be 0 with --scheduling-policy fcfs") as caught:
                harness.stream(priority=priority)
            assert caught.value.param == "priority"
        assert len(harness.line.sent) == 1

    run(work())


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ({"priority": 2**70}, "priority must be an integer in"),
        ({"priority": -(2**70)}, "priority must be an integer in"),
        ({"replica": 2**70}, "there is no replica 1180591620717411303424"),
        ({"replica": -3}, "there is no replica -3"),
    ],
)
def test_a_priority_or_replica_out_of_range_is_refused(harness: Harness, place: dict[str, Any], error: str) -> None:
    async def work() -> None:
        with pytest.raises(RequestError, match=error):
            harness.stream(**place)
        assert not harness.line.sent

    run(work())


def test_the_context_length_is_lowered_to_the_fleets(harness: Harness) -> None:
    async def work() -> None:
        long = SamplingParams(max_tokens=10**6)
        planned = harness.llm.max_model_len
        harness.stream(long)
        harness.line.status = FleetStatus("demo", 1, 1, (), 0, 0, True, 1.0, max_model_len=40)
        await harness.llm.status()
        assert harness.llm.max_model_len == planned, "asking for the status changes nothing"
        harness.line.deliver(ContextLength(40))
        assert harness.llm.max_model_len == 40
        job = harness.llm.prepare("Once", long)
        harness.llm.stream(job)
        last = harness.line.sent[-1]
        assert isinstance(last, EngineRequest)
        assert last.max_tokens == 40 - len(job.tokens)
        with pytest.raises(RequestError, match="maximum context length is 40 tokens"):
            harness.llm.prepare("Once upon a time " * 40, long)

    run(work())


def test_many_updates_at_once_do_not_block_the_event_loop(harness: Harness) -> None:
    """Other tasks run before all updates are delivered. All updates arrive, in order."""

    async def work() -> None:
        stream = harness.stream(SamplingParams(max_tokens=2000, detokenize=False, ignore_eos=True))
        harness.line.say(*(SeqUpdate(0, (token,)) for token in range(1000)))
        seen: list[int] = []
        while sum(seen) < 1000:
            await asyncio.sleep(0)
            seen.append(len(stream.output().outputs[0].token_ids) - sum(seen))
        assert max(seen) < 1000
        assert stream.output().outputs[0].token_ids == tuple(range(1000))
        stream.close()

    run(work())


def test_a_stream_has_the_log_probabilities_of_its_prompt(harness: Harness) -> None:
    async def work() -> None:
        stream = harness.stream(SamplingParams(max_tokens=5, prompt_logprobs=0))
        size = len(stream.job.tokens)
        entries = tuple(TokenLogprobs(-float(at), 1, (), ()) for at in range(1, size))
        token = harness.tokens(" a")
        harness.line.say(SeqUpdate(0, token, prompt_logprobs=PromptLogprobs(1, entries)))
        async for _ in stream:
            found = stream.prompt_logprobs
            assert found is not None
            assert found[0] is None
            values = [each[token].logprob for each, token in zip(found, stream.job.tokens, strict=True) if each]
            assert values == [-float(at) for at in range(1, size)]
            break

    run(work())


# --- generate ---------------------------------------------------------------------------------------------------


def test_generate_yields_growing_outputs(harness: Harness) -> None:
    async def work() -> None:
        params = SamplingParams(max_tokens=9, logprobs=0)
        outputs = harness.llm.generate("Once", params, "mine", priority=2, data_parallel_rank=1)
        found: list[RequestOutput] = []
        texts = [" there", " was", " a wolf"]

        async def collect() -> None:
            async for output in outputs:
                found.append(output)  # noqa: PERF401 (one by one)

        task = asyncio.create_task(collect())
        await until(lambda: bool(harness.line.sent))
        for at, text in enumerate(texts):
            tokens = harness.tokens(text)
            entries = tuple(TokenLogprobs(-0.5, 1, (), ()) for _ in tokens)
            harness.line.say(SeqUpdate(0, tokens, entries, LENGTH if at == 2 else None))
            await until(lambda at=at: len(found) == at + 1)  # type: ignore[misc]
        await task
        assert [output.outputs[0].text for output in found] == [" there", " there was", " there was a wolf"]
        assert [output.finished for output in found] == [False, False, True]
        assert [output.outputs[0].finish_reason for output in found] == [None, None, "length"]
        assert {output.request_id for output in found} == {"mine"}
        last = found[-1].outputs[0]
        assert last.cumulative_logprob == -0.5 * len(last.token_ids)
        assert last.logprobs is not None
        assert len(last.logprobs) == len(last.token_ids)
        await assert_free("mine", harness)

    run(work())


async def assert_free(request_id: str, harness: Harness) -> None:
    """Assert that no unfinished request has this request_id, so that a new one can use it."""
    before = len(harness.line.sent)
    task = asyncio.create_task(read_all(harness.llm.generate("Once", GREEDY, request_id)))
    await until(lambda: len(harness.line.sent) > before)
    assert not task.done()
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def read_all(outputs: AsyncIterator[RequestOutput]) -> list[RequestOutput]:
    return [output async for output in outputs]


def test_two_unfinished_requests_cannot_have_the_same_id(harness: Harness) -> None:
    async def work() -> None:
        async def begin() -> RequestOutput:
            return await anext(harness.llm.generate("Once", GREEDY, "mine"))

        first = await start(begin())
        await until(lambda: bool(harness.line.sent))
        with pytest.raises(RequestError, match="'mine' exists already"):
            await anext(harness.llm.generate("Once", GREEDY, "mine"))
        assert harness.line.aborted == [1]
        await harness.llm.abort("an unknown id")
        await harness.llm.abort("mine")
        assert harness.line.aborted == [1, 0]
        harness.line.say(SeqUpdate(0, (), finish=ABORT))
        output = await first
        assert (output.finished, output.outputs[0].finish_reason) == (True, "abort")

    run(work())


def test_leaving_generate_early_ends_the_request(harness: Harness) -> None:
    async def work() -> None:
        async def use() -> None:
            async for _ in harness.llm.generate("Once", GREEDY, "mine"):
                break

        task = asyncio.create_task(use())
        await until(lambda: bool(harness.line.sent))
        harness.line.say(SeqUpdate(0, harness.tokens(" a")))
        await task
        gc.collect()
        await until(lambda: harness.line.aborted == [0])
        await assert_free("mine", harness)

    run(work())


def test_an_invalid_prompt_is_not_sent(harness: Harness) -> None:
    async def work() -> None:
        with pytest.raises(RequestError, match="the prompt is empty"):
            await anext(harness.llm.generate(""))
        assert not harness.line.sent

    run(work())


# --- the end ----------------------------------------------------------------------------------------------------


def test_closing_ends_streams_with_an_error(harness: Harness) -> None:
    async def work() -> None:
        tasks = [await start(read(harness.stream())), await start(harness.stream().wait())]
        await asyncio.to_thread(harness.llm.close)
        for task in tasks:
            with pytest.raises(Unavailable, match="the engine was closed"):
                await task
        with pytest.raises(ClosedError):
            harness.stream()
        assert harness.llm.unfinished == 0
        harness.llm.close()

    run(work())


def test_updates_after_the_loop_was_closed_close_the_line(harness: Harness) -> None:
    async def work() -> None:
        harness.stream()

    asyncio.run(work())
    harness.line.say(SeqUpdate(0, harness.tokens(" a")))
    assert harness.line.closed
    last = SeqUpdate(0, harness.tokens(" a"))
    held = sys.getrefcount(last)
    harness.line.say(last)
    assert sys.getrefcount(last) == held
    harness.llm.close()


def test_an_async_llm_belongs_to_one_loop(harness: Harness) -> None:
    async def work() -> None:
        harness.stream().close()

    asyncio.run(work())
    with pytest.raises(EngineError, match="belongs to the event loop that used it first"):
        asyncio.run(work())
    with pytest.raises(EngineError, match="this thread runs none: send the call to the loop's thread"):
        harness.stream()


def test_ready_has_a_deadline(harness: Harness) -> None:
    async def work() -> None:
        with pytest.raises(EngineError, match=r"the replicas are not ready after 0.2 s"):
            await harness.llm.ready(0.2)
        with pytest.raises(UserError, match=r"status\?"):
            await harness.llm.status()

    run(work())


# --- real engines ----------------------------------------------------------------------------------------------


@asynccontextmanager
async def real(**options: Any) -> AsyncIterator[AsyncLLM]:
    async with AsyncLLM(kv_cache_memory_bytes=2**24, max_model_len=512, seed=0, **options) as llm:
        await llm.ready(DEADLINE_S)
        yield llm


PROMPTS = ["Once upon a time", "The little dog", "A girl", "There was a"] * 2


def params_of(number: int) -> SamplingParams:
    temperature = 0.0 if number % 2 else 1.0
    return SamplingParams(max_tokens=120, temperature=temperature, seed=number, ignore_eos=True, logprobs=0)


async def texts(llm: AsyncLLM, during: Callable[[], Awaitable[None]] | None = None) -> list[RequestOutput]:
    streams = [llm.stream(llm.prepare(prompt, params_of(number))) for number, prompt in enumerate(PROMPTS)]

    async def follow(stream: RequestStream) -> RequestOutput:
        deltas = await read(stream)
        output = stream.output()
        assert "".join(delta.text for delta in deltas) == output.outputs[0].text
        assert tuple(token for delta in deltas for token in delta.token_ids) == output.outputs[0].token_ids
        return output

    tasks = [asyncio.create_task(follow(stream)) for stream in streams]
    if during is not None:
        await until(lambda: all(len(stream.output().outputs[0].token_ids) > 10 for stream in streams[:4]))
        await during()
    return list(await asyncio.gather(*tasks))


def shown(outputs: Sequence[RequestOutput]) -> list[tuple[str, tuple[int, ...], str | None, int]]:
    """Return the parts of outputs that a failover must not change."""
    found = [(output.outputs[0], output.num_cached_tokens) for output in outputs]
    return [(each.text, each.token_ids, each.finish_reason, len(each.logprobs or ())) for each, _ in found]


@pytest.mark.slow
def test_streams_are_the_same_when_an_engine_dies() -> None:
    async def work() -> None:
        async with real(data_parallel_size=2, distributed_executor_backend="mp") as llm:
            twins = await texts(llm)
            status = await llm.status()
            assert [(each.state, each.restarts) for each in status.replicas] == [("ready", 0)] * 2
            killed: list[ReplicaStatus] = []

            async def kill() -> None:
                busiest = max((await llm.status()).replicas, key=lambda each: each.held)
                assert busiest.held, "all streams have ended already"
                os.kill(busiest.pid, signal.SIGKILL)
                killed.append(busiest)

            found = await texts(llm, kill)
            assert shown(found) == shown(twins)
            await llm.ready(DEADLINE_S)
            after = await llm.status()
            (victim,) = killed
            assert [each.number for each in after.replicas if each.restarts] == [victim.number]
            assert str(victim.pid) in after.replicas[victim.number].cause
            assert after.replays > 0
            assert all(each.held == 0 for each in after.replicas)
            assert shown(await texts(llm)) == shown(twins)

    run(work())


@pytest.mark.slow
def test_replicas_that_share_experts_restart_together() -> None:
    async def work() -> None:
        options = {"data_parallel_size": 2, "enable_expert_parallel": True, "distributed_executor_backend": "mp"}
        async with real(model=BUNDLED.parent / "demo_moe_model", **options) as llm:
            twins = await texts(llm)
            status = await llm.status()

            async def kill() -> None:
                os.kill(status.replicas[1].pid, signal.SIGKILL)

            assert shown(await texts(llm, kill)) == shown(twins)
            assert [each.restarts for each in (await llm.status()).replicas] == [1, 1]

    run(work())


@pytest.mark.slow
def test_a_single_replica_is_restarted_and_continues_its_requests() -> None:
    async def work() -> None:
        async with real() as llm:
            twins = await texts(llm)
            (replica,) = (await llm.status()).replicas

            async def kill() -> None:
                os.kill(replica.pid, signal.SIGKILL)

            assert shown(await texts(llm, kill)) == shown(twins)

    run(work())


@pytest.mark.slow
def test_replicas_on_threads_can_be_added_and_removed() -> None:
    async def work() -> None:
        async with real(data_parallel_size=2, distributed_executor_backend="threads") as llm:
            twins = await texts(llm)

            async def scale() -> None:
                await llm.scale(3)
                await llm.scale(1)

            assert shown(await texts(llm, scale)) == shown(twins)

            async def numbers() -> EngineStats | None:
                (replica,) = [each for each in (await llm.status()).replicas if each.state == "ready"]
                return replica.stats

            while (stats := await numbers()) is None or stats.running:
                await asyncio.sleep(0.05)
            assert stats.free_blocks == stats.num_blocks

    run(work())


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["threads", "mp"])
def test_an_added_replica_has_a_kv_cache_of_the_same_size(backend: str) -> None:
    async def work() -> None:
        async with AsyncLLM(seed=0, distributed_executor_backend=backend) as llm:
            await llm.ready(DEADLINE_S)
            await llm.scale(2)
            while len(states := [each for each in (await llm.status()).replicas if each.state == "ready"]) < 2:
                assert "failed" not in [each.state for each in (await llm.status()).replicas]
                await asyncio.sleep(0.05)
            first, second = (each.stats for each in states)
            assert first is not None
            assert second is not None
            assert (first.num_blocks, first.max_model_len) == (second.num_blocks, second.max_model_len)

    run(work())


@pytest.mark.slow
def test_blocks_of_a_dropped_stream_are_freed() -> None:
    async def work() -> None:
        async with real(distributed_executor_backend="threads") as llm:
            params = SamplingParams(n=64, max_tokens=500, ignore_eos=True)  # far more tokens than the cache holds
            stream = llm.stream(llm.prepare("Once", params))
            async for _ in stream:
                break
            gc.collect()

            async def free() -> bool:
                (replica,) = (await llm.status()).replicas
                return replica.stats is not None and bool(replica.stats.steps) and not replica.stats.running

            while not await free():
                await asyncio.sleep(0.05)
            (replica,) = (await llm.status()).replicas
            assert replica.stats is not None
            assert replica.stats.generated_tokens < 64 * 500 / 2
            assert replica.stats.free_blocks == replica.stats.num_blocks

    run(work())


def test_a_user_error_of_a_replica_is_raised_by_ready() -> None:
    async def work() -> None:
        with pytest.raises(UserError, match="--max-model-len"):
            async with AsyncLLM(kv_cache_memory_bytes=100_000, max_model_len=1024) as llm:
                await llm.ready(DEADLINE_S)

    run(work())
