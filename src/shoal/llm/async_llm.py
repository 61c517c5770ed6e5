"""Inference with asyncio: the class `AsyncLLM`, for services in Python and for the server.

Replicas that end are restarted.
"""

import asyncio
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from os import PathLike
from typing import Any

from shoal.cluster.fleet_connections import FleetConnection, FleetMessage
from shoal.cluster.fleet_server import FleetServer
from shoal.cluster.fleet_trace import FleetTrace
from shoal.config.engine_options import EngineOptions, from_environment
from shoal.errors import ClosedError, EngineError, RequestError, ShoalError
from shoal.launch.early_failure import told_to_other_hosts
from shoal.launch.open_model import OpenModel, name_of, open_model, trace_target
from shoal.launch.start_fleet import start_fleet
from shoal.llm.comm_profile import print_profile
from shoal.llm.outputs import PromptOutputs
from shoal.llm.pause_and_sleep import PauseAndSleep
from shoal.llm.request_builder import RequestBuilder
from shoal.llm.request_stream import RequestStream
from shoal.log import get_logger
from shoal.outputs import RequestOutput
from shoal.params import Message as ChatMessage
from shoal.params import Prompt, SamplingParams
from shoal.process.forks import Owner
from shoal.protocols import Recorder
from shoal.text.prompts import Job
from shoal.text.tokenizer import Tokenizer
from shoal.values import shown
from shoal.wire.base import replace_fields
from shoal.wire.engine import Abort, Finish, RefusalKind, SeqUpdate, Updates
from shoal.wire.fleet import ContextLength, FleetStatus, fleet_status_decoder
from shoal.wire.trace import TraceSummary, trace_summary_decoder

log = get_logger("requests")

_POLL_S = 0.05
_MAX_UPDATES_PER_TURN = 512  # how many updates are handed out before other tasks of the event loop may run
ANSWER_S = 30.0  # how long the fleet may take to answer a question
_PROFILE_S = 5.0  # how long it may take before the fleet is closed
_CLOSED = "the engine was closed"
_PRIORITIES = range(-(1 << 63), 1 << 63)  # the integers that a message can hold
_MAX_REPLICAS = 1 << 31


class AsyncLLM(PauseAndSleep):
    """A model with replicas that run in the background, for one event loop.

    All calls must come from one event loop, and from the process that made the object: in a forked child they are
    refused, and the end of the child has no effect on the replicas. (A child made with `os.fork` must end with
    `os._exit`, as those of `multiprocessing` do: it shares the event loop's file descriptors with its parent, and a
    normal exit would close the loop for both.)

    Requests may be made immediately. They wait until a replica is ready, which takes seconds; `await llm.ready()`
    waits for the same.
    """

    def __init__(
        self,
        model: str | PathLike[str] | OpenModel | None = None,
        *,
        recorder: Recorder | None = None,
        verbs: Mapping[str, Callable[[bytes], bytes]] | None = None,
        connect: Callable[[Callable[[FleetMessage], object]], FleetConnection] | None = None,
        **options: Any,
    ) -> None:
        """Start the replicas, and do not wait for them.

        Args:
            model: as for `LLM`.
            recorder: receives the events of every request, for metrics.
            verbs: more verbs for `ask`, and the functions that answer them.
            connect: opens a connection to the fleet of another process; None: a fleet is started here.
            options: those of `LLM` and of `shoal serve`.

        Raises:
            UserError: model, options and host do not fit together; nothing was started.
        """
        if not isinstance(model, OpenModel):
            given = {**from_environment(online=True), **options}
            with told_to_other_hosts(given):
                model = open_model(name_of(model), given, online=True)
        self._owner = Owner("AsyncLLM")
        self._model = model
        self._reader = model.reader()
        seed = model.options.model_options.seed if "seed" in model.given else secrets.randbits(63)
        self._requests = RequestBuilder(model.generation.eos, max_model_len=model.served.max_model_len, seed=seed)
        self._grammars = model.grammar_checker()
        self._next_seq = 0
        self._streams: dict[int, RequestStream] = {}  # by the number of each of their requests
        self._named: dict[str, RequestStream] = {}  # by request_id
        self._loop: asyncio.AbstractEventLoop | None = None
        self._arrived: list[tuple[int, SeqUpdate]] = []  # updates, with the numbers that their requests have here
        self._arrived_lock = threading.Lock()
        self._closed = False
        self._fleet_server: FleetServer | None = None
        if connect is None:
            self._fleet_server = _start_fleet_server(model, recorder, verbs)
            connect = self._fleet_server.open
        self._connection = connect(self._deliver)

    # --- the model -----------------------------------------------------------------------------------------------

    @property
    def options(self) -> EngineOptions:
        return self._model.options

    @property
    def model_name(self) -> str:
        """The name that the user gave to the model, or the name of the bundled model."""
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
        """The most tokens that a prompt and its output may have together.

        The KV caches may turn out to hold less than was planned. The fleet lowers this number when its first replicas
        are ready, at the latest when `ready` returns.
        """
        return self._requests.max_model_len

    @property
    def unfinished(self) -> int:
        """The number of outputs that were requested here and have not ended yet."""
        return len(self._streams)

    @property
    def fleet_server(self) -> FleetServer | None:
        """The thread that drives the fleet; None if another process has the fleet."""
        return self._fleet_server

    def default_sampling_params(self, base: SamplingParams | None = None) -> SamplingParams:
        """Return `base` with the sampling defaults of the model's generation_config.json.

        With --generation-config vllm the file is ignored.
        """
        return self._model.default_sampling_params(base)

    # --- requests ------------------------------------------------------------------------------------------------

    def prepare(self, prompt: Prompt, params: SamplingParams, *, add_special_tokens: bool = True) -> Job:
        """Prepare a prompt for `stream`. For a long prompt this takes a while: use `asyncio.to_thread`.

        Args:
            add_special_tokens: let the tokenizer add its special tokens before and after a text.

        Raises:
            RequestError: the prompt or a parameter is invalid.
        """
        return self._reader.prepare(0, prompt, params, add_special_tokens=add_special_tokens)

    def prepare_chat(self, messages: Sequence[ChatMessage], params: SamplingParams, **template: Any) -> Job:
        """Prepare a conversation for `stream`.

        Args:
            template: arguments for `ChatTemplate.render`.

        Raises:
            RequestError: a message or a parameter is invalid, or the template cannot render the messages.
        """
        return self._reader.prepare_chat(0, messages, params, **template)

    async def check_grammar(self, job: Job) -> None:
        """Check that the grammar of a job's structured output can be compiled.

        If the task is cancelled, the work on the grammar stops.

        Raises:
            RequestError: it cannot be compiled, or takes too much time or memory.
            EngineError: too many grammars wait to be checked already.
        """
        if job.grammar:
            await asyncio.wrap_future(self._grammars.submit(job.grammar))

    def chat_tokens(self, messages: Sequence[ChatMessage], **template: Any) -> tuple[int, ...]:
        """Return the tokens of a conversation, which may be longer than the model allows.

        Raises:
            RequestError: there is no chat template, or it cannot render the messages.
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
        name: str = "",
    ) -> RequestStream:
        """Begin a request, and return the stream of its outputs.

        Args:
            priority: requests with a lower number run first.
            replica: the number of the only replica that may run it; None: any.
            timeout: seconds from the arrival after which an unfinished request ends with an `Overdue`.
            arrival: when the request arrived, in `time.monotonic()`; None: now.
            name: what the client knows it by, for traces; "": its number.

        Raises:
            RequestError: `priority` or `replica` is out of range.
            ClosedError: this object was closed.
        """
        if not isinstance(priority, int) or priority not in _PRIORITIES:
            raise RequestError.about("priority", f"must be an integer in [-2^63, 2^63), got {shown(priority)}")
        if priority and self.options.scheduler.scheduling_policy == "fcfs":
            raise RequestError.about(
                "priority", f"must be 0 with --scheduling-policy fcfs, got {priority}: leave it out"
            )
        if replica is not None and not 0 <= replica < _MAX_REPLICAS:
            why = f"there is no replica {shown(replica)}: replicas are numbered from 0"
            raise RequestError(why, "data_parallel_rank")
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
                name=name,
            )
            for request in self._requests.build(job, first)
        ]
        outputs = PromptOutputs.begin(job, self.tokenizer, self._requests.eos)
        stream = RequestStream(self, outputs, [request.seq for request in requests])
        self._streams.update((request.seq, stream) for request in requests)
        try:
            self._connection.send(requests)
        except ClosedError:
            self._forget(stream)
            raise
        return stream

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        data_parallel_rank: int | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Generate the outputs of a prompt, and yield all of them so far whenever they grow.

        The last item is `finished`.

        Args:
            request_id: a name for `abort`, which no other unfinished request has.
            priority: requests with a lower number run first.
            data_parallel_rank: the number of the only replica that may run it; None: any.

        Raises:
            RequestError: the prompt, a parameter, the request_id or the number of the replica is invalid.
            Unavailable: the request was not accepted, or not finished in time.
            EngineError: the request cannot be finished.
        """
        params = sampling_params or self.default_sampling_params()
        job = await asyncio.to_thread(self.prepare, prompt, params)
        await self.check_grammar(job)
        stream = self.stream(job, priority=priority, replica=data_parallel_rank, name=request_id or "")
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
        """Generate the answers to a conversation, and yield all of them so far whenever they grow.

        Arguments and errors are those of `generate`. `template` are arguments for `ChatTemplate.render`.
        """
        params = sampling_params or self.default_sampling_params()
        job = await asyncio.to_thread(self.prepare_chat, messages, params, **template)
        await self.check_grammar(job)
        stream = self.stream(job, priority=priority, replica=data_parallel_rank, name=request_id or "")
        async for output in self._outputs(stream, request_id):
            yield output

    async def _outputs(self, stream: RequestStream, request_id: str | None) -> AsyncIterator[RequestOutput]:
        name = f"request-{stream.number}" if request_id is None else request_id
        try:
            if name in self._named:
                why = f"request {name!r} exists already: give each request a request_id of its own"
                raise RequestError(why, "request_id")
            self._named[name] = stream
            async for _ in stream:
                yield stream.output(name)
        finally:
            stream.close()
            if self._named.get(name) is stream:
                del self._named[name]

    async def abort(self, request_id: str) -> None:
        """End a request of `generate` or `chat`. Its outputs finish with the reason "abort". Idempotent."""
        stream = self._named.get(request_id)
        if stream is not None:
            stream.abort()

    def release(self, seqs: Sequence[int], *, stopped: bool = False) -> None:
        """End requests in the fleet, and ignore everything that still comes of them.

        Args:
            stopped: True if their outputs are complete because they have reached a stop text.
        """
        for seq in seqs:
            self._streams.pop(seq, None)
        self.end(seqs, stopped=stopped)

    def end(self, seqs: Sequence[int], *, stopped: bool = False) -> None:
        """End requests in the fleet. Their last updates still come."""
        if seqs:
            with suppress(ClosedError):
                self._connection.send([Abort(tuple(seqs), stopped)])

    def _forget(self, stream: RequestStream) -> None:
        for seq in stream.seqs:
            self._streams.pop(seq, None)

    # --- the fleet -----------------------------------------------------------------------------------------------

    async def ready(self, timeout: float | None = None) -> None:
        """Wait until all replicas of this host can serve requests.

        Raises:
            UserError, EngineError: a replica could not start, or not within `timeout` seconds.
        """
        try:
            async with asyncio.timeout(timeout):
                while not await self.ask("started"):
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise EngineError(f"the replicas are not ready after {timeout:g} s") from None

    async def status(self) -> FleetStatus:
        """Return the state of all replicas.

        Raises:
            EngineError: the fleet does not answer.
        """
        return fleet_status_decoder.decode(await self.ask("status"))

    async def scale(self, replicas: int) -> FleetStatus:
        """Change the number of replicas. Return the new state, without waiting for replicas to start or to end.

        Raises:
            UserError: this number of replicas is not possible.
            EngineError: the fleet has failed.
        """
        return fleet_status_decoder.decode(await self.ask("scale", str(replicas).encode()))

    async def ask(self, verb: str, payload: bytes = b"", *, patient: bool = False) -> bytes:
        """Ask the fleet, and return its answer.

        Args:
            verb: what is asked, such as "status".
            payload: the argument of the verb.
            patient: wait for the answer without a deadline.

        Raises:
            UserError, EngineError: the fleet refuses, or does not answer.
        """
        try:
            async with asyncio.timeout(None if patient else ANSWER_S):
                return await asyncio.wrap_future(self._connection.ask(verb, payload))
        except TimeoutError:
            raise EngineError(f"the fleet has not answered {verb!r} within {ANSWER_S:g} s") from None

    async def start_profile(self) -> None:
        """Begin a trace. It is written to a file of this host: see `--trace`.

        Raises:
            UserError: a trace is recorded already, or its file cannot be written.
            EngineError: the fleet has failed.
        """
        await self.ask("start_profile")

    async def stop_profile(self) -> TraceSummary:
        """End the trace, and return where it is.

        Raises:
            UserError: no trace is recorded.
            EngineError: the fleet has failed.
        """
        return trace_summary_decoder.decode(await self.ask("stop_profile", patient=True))

    async def drain(self, timeout: float) -> bool:
        """Refuse new requests, and wait up to `timeout` seconds for the others. Return True if all have ended."""
        deadline = asyncio.get_running_loop().time() + timeout
        while int(await self.ask("drain")):
            if asyncio.get_running_loop().time() >= deadline:
                return False
            await asyncio.sleep(_POLL_S)
        return True

    def close(self) -> None:
        """End all requests, and the replicas that were started here. Idempotent; in a forked child it does nothing."""
        if not self._owner.is_here:
            return
        if self.options.parallel.profile_comm and self._fleet_server is not None and not self._closed:
            self._print_comm_profile()
        self._closed = True
        self._grammars.close()
        if self._fleet_server is not None:
            self._fleet_server.close()
        else:
            self._connection.close()
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop was closed, so no task waits any more
                self._loop.call_soon_threadsafe(self._end_all)

    def _print_comm_profile(self) -> None:
        """Print what communication between the ranks has cost. Counts are from their start, their warm-up included."""
        try:
            status = fleet_status_decoder.decode(self._connection.ask("status").result(_PROFILE_S))
        except (ShoalError, TimeoutError) as error:
            log.warning(
                "--profile-comm has no figures, since the fleet does not answer: %s", error or type(error).__name__
            )
            return
        print_profile([replica.stats for replica in status.replicas if replica.stats is not None])

    def _end_all(self) -> None:
        while self._arrived:  # the fleet's updates first, because they say more
            self._take()
        for seq in list(self._streams):
            lost = SeqUpdate(seq, (), finish=Finish.ABORT, error=_CLOSED, refusal=RefusalKind.CLOSING)
            self._hand_out(seq, lost)

    async def __aenter__(self) -> "AsyncLLM":
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    # --- from the thread of the fleet to the loop ----------------------------------------------------------------

    def _bind_loop(self) -> asyncio.AbstractEventLoop:
        self._owner.check()
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise EngineError(
                "an AsyncLLM is used from an event loop, but this thread runs none: send the call to the loop's thread "
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

    def _deliver(self, message: FleetMessage) -> None:
        """Add a message of the fleet to those that the event loop will take. The thread of the fleet calls it.

        The loop is woken only for the first of several messages, and then takes all of them.
        """
        if isinstance(message, ContextLength):
            self._requests.max_model_len = message.max_model_len
            self._reader = self._model.reader(message.max_model_len)
        if not isinstance(message, Updates) or self._loop is None:
            return
        with self._arrived_lock:
            first = not self._arrived
            self._arrived += [(update.seq - message.base, update) for update in message.updates]
        if first:
            try:
                self._loop.call_soon_threadsafe(self._take)
            except RuntimeError:  # the loop was closed, so no task waits any more
                self._arrived.clear()
                self._connection.close()

    def _take(self) -> None:
        """Hand the updates that have arrived to their streams.

        If there are many, only some are handed out, so that other tasks of the loop can run before the rest.
        """
        with self._arrived_lock:
            updates, self._arrived = self._arrived[:_MAX_UPDATES_PER_TURN], self._arrived[_MAX_UPDATES_PER_TURN:]
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
        except Exception:  # most likely from a tokenizer; it must end this request only
            log.exception("failed to make the text of request %d", seq)
            stream.fail(EngineError("failed to make the text of an output; see the log of the server for the reason"))
        if update.finish is not None:
            self._streams.pop(seq, None)


def _start_fleet_server(
    model: OpenModel, recorder: Recorder | None, verbs: Mapping[str, Callable[[bytes], bytes]] | None
) -> FleetServer:
    fleet = start_fleet(model, recorder)
    try:
        target = trace_target(model.options, model.manual_place)
        trace = FleetTrace(fleet, target, model.options.tracing.trace_events, model.name)
    except BaseException:
        fleet.close()
        raise
    return FleetServer(fleet, verbs, trace=trace)
