"""`AsyncLLM`: a model behind asyncio, for services in Python and for the server. Replicas that end come back."""

import asyncio
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from os import PathLike
from typing import Any

from shoal.cluster.desk import Answer as Message
from shoal.cluster.desk import Desk, FleetConnection
from shoal.config.engine_options import EngineOptions, from_environment
from shoal.errors import ClosedError, EngineError, Overdue, QueueFull, RequestError, ShoalError, Unavailable
from shoal.launch.open_model import OpenModel, name_of, open_model
from shoal.launch.start_fleet import start_fleet
from shoal.llm.deltas import Delta
from shoal.llm.outputs import Answer
from shoal.llm.pause_and_sleep import Operable
from shoal.llm.requests import Requests
from shoal.log import get_logger
from shoal.outputs import Logprobs, RequestOutput
from shoal.params import Message as ChatMessage
from shoal.params import Prompt, SamplingParams
from shoal.process.forks import Owner
from shoal.protocols import Recorder
from shoal.text.prompts import Job
from shoal.text.tokenizer import Tokenizer
from shoal.values import shown
from shoal.wire.base import replace_fields
from shoal.wire.engine import Abort, Finish, RefusalKind, SeqUpdate, Updates
from shoal.wire.fleet import FleetStatus, fleet_status_decoder

log = get_logger("requests")

_POLL_S = 0.05
_AT_ONCE = 512  # updates that are handed out in a row
ANSWER_S = 30.0  # for whoever has the fleet to answer a question
_CLOSED = "the engine was closed"
_RETRY_S = {
    RefusalKind.FULL: 1.0,
    RefusalKind.LATE: 5.0,
    RefusalKind.CLOSING: 10.0,
    RefusalKind.LOST: 10.0,
    RefusalKind.ASLEEP: 10.0,
}
_PRIORITIES = range(-(1 << 63), 1 << 63)  # what a message can carry
_MOST_REPLICAS = 1 << 31


class AsyncLLM(Operable):
    """Takes what `LLM` takes, and the options of `shoal serve`. All calls come from one event loop, and from the
    process that has made it: in a child that was forked they are refused, and its end does nothing to the replicas. (A
    child that is forked by hand must end by `os._exit`, as those of `multiprocessing` do: asyncio's own loop is shared
    with it, and would be closed for both.)

    Requests may be made at once: they wait for the replicas, which take seconds to start. `await llm.ready()` to know.

    Raises:
        UserError: model, options and host do not go together; nothing was started.
    """

    def __init__(
        self,
        model: str | PathLike[str] | OpenModel | None = None,
        *,
        recorder: Recorder | None = None,
        verbs: Mapping[str, Callable[[bytes], bytes]] | None = None,
        line: Callable[[Callable[[Message], object]], FleetConnection] | None = None,
        **options: Any,
    ) -> None:
        """`recorder` is told of every request, `verbs` are what `ask` can ask for besides. `line` opens a way to a
        fleet that somebody else has; without it one is started here."""
        if not isinstance(model, OpenModel):
            model = open_model(name_of(model), {**from_environment(online=True), **options}, online=True)
        self._owner = Owner("AsyncLLM")
        self._model = model
        self._reader = model.reader()
        seed = model.options.model_options.seed if "seed" in model.given else secrets.randbits(63)
        self._requests = Requests(model.generation.eos, max_model_len=model.served.max_model_len, seed=seed)
        self._grammars = model.grammar_checker()
        self._next_seq = 0
        self._streams: dict[int, RequestStream] = {}  # by the numbers of their requests
        self._named: dict[str, RequestStream] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._arrived: list[tuple[int, SeqUpdate]] = []  # with the numbers that requests have here
        self._arrived_lock = threading.Lock()
        self._closed = False
        self._desk: Desk | None = None
        if line is None:
            self._desk = Desk(start_fleet(model, recorder), verbs)
            line = self._desk.open
        self._line = line(self._deliver)

    # --- what is served ------------------------------------------------------------------------------------------

    @property
    def options(self) -> EngineOptions:
        return self._model.options

    @property
    def model_name(self) -> str:
        """As it was given; the bundled model's folder has no name of its own."""
        return self._model.name

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._model.tokenizer

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size

    @property
    def eos(self) -> tuple[int, ...]:
        return self._model.generation.eos

    @property
    def max_model_len(self) -> int:
        """Tokens that a prompt and its output may have. Where the replicas' KV caches hold less than was planned, that
        is known once `ready` or `status` was awaited; requests are cut to it in any case."""
        return self._requests.max_model_len

    @property
    def unfinished(self) -> int:
        """Outputs that were asked for here and have not ended yet."""
        return len(self._streams)

    @property
    def desk(self) -> Desk | None:
        """Where other processes' lines end; None where this is such a line."""
        return self._desk

    def default_sampling_params(self, base: SamplingParams | None = None) -> SamplingParams:
        """`base`, with what the model's generation_config.json says for sampling, unless --generation-config vllm."""
        return self._model.default_sampling_params(base)

    # --- requests ------------------------------------------------------------------------------------------------

    def prepare(self, prompt: Prompt, params: SamplingParams, *, add_special_tokens: bool = True) -> Job:
        """A prompt made ready for `stream`. Takes a while for a long one: see `asyncio.to_thread`.
        `add_special_tokens`: those that the tokenizer puts around a text.

        Raises:
            RequestError: it can't be used.
        """
        return self._reader.prepare(0, prompt, params, add_special_tokens=add_special_tokens)

    def prepare_chat(self, messages: Sequence[ChatMessage], params: SamplingParams, **template: Any) -> Job:
        """A conversation made ready for `stream`; `template` goes to `ChatTemplate.render`.

        Raises:
            RequestError: it can't be used.
        """
        return self._reader.prepare_chat(0, messages, params, **template)

    async def check_grammar(self, job: Job) -> None:
        """Finds out whether the structured output that a job asks for can be obeyed. Cancelled, it takes no more time.

        Raises:
            RequestError: it can't; or to compile it takes too much time or memory.
            EngineError: too many wait for that already.
        """
        if job.grammar:
            await asyncio.wrap_future(self._grammars.submit(job.grammar))

    def chat_tokens(self, messages: Sequence[ChatMessage], **template: Any) -> tuple[int, ...]:
        """The tokens of a conversation, be it longer than the model takes.

        Raises:
            RequestError: there is no template, or the messages do not fit it.
        """
        return self._reader.chat_tokens(messages, **template)

    def stream(
        self,
        job: Job,
        *,
        priority: int = 0,
        replica: int | None = None,
        timeout: float | None = None,
        arrival: float | None = None,
    ) -> "RequestStream":
        """Begins a request. `replica`: the only one that may run it. It ends with an `Overdue` if it is not finished
        `timeout` seconds after its `arrival` (time.monotonic(); without it, now).

        Raises:
            RequestError: `priority` or `replica` is out of its range.
            ClosedError: this was closed.
        """
        if not isinstance(priority, int) or priority not in _PRIORITIES:
            raise RequestError(f"priority must be an integer from -2**63 to 2**63 - 1, got {shown(priority)}")
        if priority and self.options.scheduler.scheduling_policy == "fcfs":
            raise RequestError(f"priority must be 0 with --scheduling-policy fcfs, got {priority}: leave it out")
        if replica is not None and not 0 <= replica < _MOST_REPLICAS:
            raise RequestError(f"there is no replica {shown(replica)}: they are numbered from 0")
        self._bind_loop()
        if self._closed:
            raise ClosedError(_CLOSED)
        first = self._next_seq
        self._next_seq += job.params.n
        arrival = time.monotonic() if arrival is None else arrival
        deadline = None if timeout is None else arrival + timeout
        requests = [
            replace_fields(
                request,
                priority=priority,
                replica=-1 if replica is None else replica,
                arrival=arrival,
                deadline=deadline,
            )
            for request in self._requests.of(job, first)
        ]
        answer = Answer.begun(job, self.tokenizer, self._requests.eos)
        found = RequestStream(self, answer, [request.seq for request in requests])
        self._streams.update((request.seq, found) for request in requests)
        try:
            self._line.send(requests)
        except ClosedError:
            self._forget(found)
            raise
        return found

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        data_parallel_rank: int | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """The output so far, again and again while it grows; the last one is `finished`.

        Raises:
            RequestError: the prompt, a parameter, the request_id or the number of the replica can't be used.
            Unavailable: it is not taken, or not finished in time.
            EngineError: it can't go on.
        """
        params = sampling_params or self.default_sampling_params()
        job = await asyncio.to_thread(self.prepare, prompt, params)
        await self.check_grammar(job)
        stream = self.stream(job, priority=priority, replica=data_parallel_rank)
        async for output in self._outputs(stream, request_id):
            yield output

    async def chat(
        self,
        messages: Sequence[ChatMessage],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        data_parallel_rank: int | None = None,
        **template: Any,
    ) -> AsyncIterator[RequestOutput]:
        """As `generate`, through the model's chat template or the one in `template`."""
        params = sampling_params or self.default_sampling_params()
        job = await asyncio.to_thread(self.prepare_chat, messages, params, **template)
        await self.check_grammar(job)
        stream = self.stream(job, priority=priority, replica=data_parallel_rank)
        async for output in self._outputs(stream, request_id):
            yield output

    async def _outputs(self, stream: "RequestStream", request_id: str | None) -> AsyncIterator[RequestOutput]:
        name = f"request-{stream.number}" if request_id is None else request_id
        try:
            if name in self._named:
                raise RequestError(f"request {name!r} exists already: give each a request_id of its own")
            self._named[name] = stream
            async for _ in stream:
                yield stream.output(name)
        finally:
            stream.close()
            if self._named.get(name) is stream:
                del self._named[name]

    async def abort(self, request_id: str) -> None:
        """Ends a request of `generate` or `chat`: its outputs finish with the reason "abort". Idempotent."""
        stream = self._named.get(request_id)
        if stream is not None:
            stream.abort()

    def release(self, seqs: Sequence[int], *, stopped: bool = False) -> None:
        """Forgets requests, and has them ended where they run. `stopped`: a stop text has ended them."""
        for seq in seqs:
            self._streams.pop(seq, None)
        self.end(seqs, stopped=stopped)

    def end(self, seqs: Sequence[int], *, stopped: bool = False) -> None:
        """Has requests ended where they run, which they say in turn."""
        if seqs:
            with suppress(ClosedError):
                self._line.send([Abort(tuple(seqs), stopped)])

    def _forget(self, stream: "RequestStream") -> None:
        for seq in stream.seqs:
            self._streams.pop(seq, None)

    # --- the fleet -----------------------------------------------------------------------------------------------

    async def ready(self, timeout: float | None = None) -> None:
        """Waits until requests can be served, by every replica of this host.

        Raises:
            UserError, EngineError: a replica could not start, or not within `timeout` seconds.
        """
        try:
            async with asyncio.timeout(timeout):
                while not await self.ask("started"):
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise EngineError(f"no replica is ready after {timeout:g} s") from None
        await self.status()

    async def status(self) -> FleetStatus:
        """
        Raises:
            EngineError: nobody answers.
        """
        found = fleet_status_decoder.decode(await self.ask("status"))
        if 0 < found.max_model_len < self.max_model_len:  # the fleet knows when its first replicas are ready
            self._requests.max_model_len = found.max_model_len
            self._reader = self._model.reader(found.max_model_len)
        return found

    async def scale(self, replicas: int) -> FleetStatus:
        """Has so many replicas from now on. Does not wait for those that start.

        Raises:
            UserError: it can't have that many.
            EngineError: none is left.
        """
        return fleet_status_decoder.decode(await self.ask("scale", str(replicas).encode()))

    async def ask(self, verb: str, payload: bytes = b"", *, patient: bool = False) -> bytes:
        """Whoever has the fleet answers; soon, unless this is `patient`.

        Raises:
            UserError, EngineError: what it says against it; or nobody is there.
        """
        try:
            async with asyncio.timeout(None if patient else ANSWER_S):
                return await asyncio.wrap_future(self._line.ask(verb, payload))
        except TimeoutError:
            raise EngineError(f"the engine has not answered {verb!r} within {ANSWER_S:g} s") from None

    async def drain(self, timeout: float) -> bool:
        """Takes nothing new, and waits up to `timeout` seconds for what runs. True: it has all ended."""
        deadline = asyncio.get_running_loop().time() + timeout
        while int(await self.ask("drain")):
            if asyncio.get_running_loop().time() >= deadline:
                return False
            await asyncio.sleep(_POLL_S)
        return True

    def close(self) -> None:
        """Ends all replicas that were started here, and all requests; in a forked child it does nothing. Idempotent."""
        if not self._owner.is_here:
            return
        self._closed = True
        self._grammars.close()
        if self._desk is not None:
            self._desk.close()
        else:
            self._line.close()
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop was closed: nobody is left to tell
                self._loop.call_soon_threadsafe(self._end_all)

    def _end_all(self) -> None:
        while self._arrived:  # what the desk had to say of it
            self._take()
        for seq in list(self._streams):
            lost = SeqUpdate(seq, (), finish=Finish.ABORT, error=_CLOSED, refusal=RefusalKind.CLOSING)
            self._hand_out(seq, lost)

    async def __aenter__(self) -> "AsyncLLM":
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    # --- from the desk's thread to the loop ----------------------------------------------------------------------

    def _bind_loop(self) -> asyncio.AbstractEventLoop:
        self._owner.check()
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise EngineError(
                "an AsyncLLM is used from an event loop, and this thread runs none: send the call to the loop's thread "
                "with asyncio.run_coroutine_threadsafe"
            ) from None
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise EngineError(
                "an AsyncLLM belongs to the event loop that used it first: make one for each loop, or send the call to "
                "that loop with asyncio.run_coroutine_threadsafe"
            )
        return loop

    def _deliver(self, message: Message) -> None:
        """On another thread. What comes before the loop has looked is handed over in one go."""
        if not isinstance(message, Updates) or self._loop is None:
            return
        with self._arrived_lock:
            first = not self._arrived
            self._arrived += [(update.seq - message.base, update) for update in message.updates]
        if first:
            try:
                self._loop.call_soon_threadsafe(self._take)
            except RuntimeError:  # the loop was closed: nobody is left to tell
                self._arrived.clear()
                self._line.close()

    def _take(self) -> None:
        """Hands out what has come; where that is much, others have the loop before the rest."""
        with self._arrived_lock:
            updates, self._arrived = self._arrived[:_AT_ONCE], self._arrived[_AT_ONCE:]
            rest = bool(self._arrived)
        for seq, update in updates:
            self._hand_out(seq, update)
        if rest and self._loop is not None:
            self._loop.call_soon(self._take)

    def _hand_out(self, seq: int, update: SeqUpdate) -> None:
        stream = self._streams.get(seq)
        if stream is None:
            return
        try:
            stream.take(seq, update)
        except Exception:  # a tokenizer's, most likely: it is this request's end, and no other's
            log.exception("the text of request %d can't be made", seq)
            stream.fail(EngineError("the text of an output can't be made; the log of the server says why"))
        if update.finish is not None:
            self._streams.pop(seq, None)


class RequestStream:
    """What comes of one request. Iterating gives deltas; those that come while nobody reads are merged.

    Leaving the loop before the end, or the end of the task that waits, ends the request where it runs. Whoever does
    not iterate calls `wait` or `close`.
    """

    def __init__(self, llm: AsyncLLM, answer: Answer, seqs: Sequence[int]) -> None:
        self.job = answer.job
        self.seqs = list(seqs)
        self._llm = llm
        self._answer = answer
        self._running = set(seqs)
        self._changed: dict[int, bool] = {}  # outputs with something new; True: it is the last
        self._error: ShoalError | None = None
        self._wakeup = asyncio.Event()

    @property
    def number(self) -> int:
        return self.seqs[0]

    @property
    def cached_tokens(self) -> int:
        """Of the prompt, found in the prefix cache; known from the first deltas on."""
        return self._answer.cached_tokens

    @property
    def prompt_logprobs(self) -> Sequence[Logprobs | None] | None:
        """One a prompt token, None for the first; None where they were not asked for. They are described when somebody
        looks at them."""
        return self._answer.described_prompt()

    @property
    def prompt_told(self) -> bool:
        """Is everything known that was asked about the prompt?"""
        return self._answer.prompt_told

    async def __aiter__(self) -> AsyncIterator[Sequence[Delta]]:
        try:
            while self._running or self._changed:
                if self._changed:
                    changed, self._changed = self._changed, {}
                    completions = self._answer.completions
                    yield [completions[index].delta(last=last) for index, last in sorted(changed.items())]
                else:
                    await self._something_new()
            if self._error is not None:
                raise self._error
        finally:
            self.close()

    async def wait(self) -> RequestOutput:
        """Runs to the end. Log-probabilities are described when somebody looks at them.

        Raises:
            RequestError, Unavailable, EngineError: as `AsyncLLM.generate`.
        """
        try:
            while self._running:
                await self._something_new()
        finally:
            self.close()
        if self._error is not None:
            raise self._error
        return self._output(None, on_demand=True)

    async def _something_new(self) -> None:
        self._wakeup.clear()
        await self._wakeup.wait()

    def output(self, request_id: str | None = None) -> RequestOutput:
        """All of it so far. An output that is not complete has no `finish_reason`, and text that is certain."""
        return self._output(request_id, on_demand=False)

    def _output(self, request_id: str | None, *, on_demand: bool) -> RequestOutput:
        outputs = [
            completion.output(ended=seq not in self._running, on_demand=on_demand)
            for seq, completion in zip(self.seqs, self._answer.completions, strict=True)
        ]
        prompt = self.prompt_logprobs
        return RequestOutput(
            request_id=f"request-{self.number}" if request_id is None else request_id,
            prompt=self.job.prompt,
            prompt_token_ids=self.job.tokens,
            outputs=tuple(outputs),
            num_cached_tokens=self.cached_tokens,
            error=None if self._error is None else str(self._error),
            finished=not self._running and self._error is None,
            prompt_logprobs=prompt if on_demand or prompt is None else tuple(prompt),
        )

    def abort(self) -> None:
        """Its outputs end where they are, and say so."""
        self._llm.end(list(self._running))

    def close(self) -> None:
        """Ends it where it runs. Idempotent."""
        if self._running:
            self._llm.release(list(self._running))
            self._running.clear()
            self._wakeup.set()

    def fail(self, error: ShoalError) -> None:
        """Ends it with an error, here and where it runs."""
        self._error = error
        self.close()
        self._wakeup.set()

    def take(self, seq: int, update: SeqUpdate) -> None:
        """Take in what has come of the output that has the number `seq` here."""
        if seq not in self._running:
            return
        index = seq - self.number
        stopped = self._answer.take(index, update)
        if stopped and update.finish is None:
            self._llm.release((seq,), stopped=True)
        ended = stopped or update.finish is not None
        if ended:
            self._running.discard(seq)
            self._answer.running -= 1
        if update.error:
            self._error = _error_of(update)
            self.close()  # its other outputs are of no use
        elif ended or update.tokens:
            self._changed[index] = ended
        self._wakeup.set()


def _error_of(update: SeqUpdate) -> ShoalError:
    match update.refusal:
        case RefusalKind.INVALID:
            return RequestError(update.error)
        case RefusalKind.FULL:
            return QueueFull(update.error, _RETRY_S[update.refusal])
        case RefusalKind.LATE:
            return Overdue(update.error, _RETRY_S[update.refusal])
        case RefusalKind.CLOSING | RefusalKind.LOST | RefusalKind.ASLEEP:
            return Unavailable(update.error, _RETRY_S[update.refusal])
        case _:
            return EngineError(update.error)
