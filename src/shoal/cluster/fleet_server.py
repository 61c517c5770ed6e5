"""The thread that drives a fleet and serves its clients."""

import contextlib
import itertools
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from shoal.cluster.fleet import Fleet
from shoal.cluster.fleet_connections import (
    Client,
    FleetConnection,
    FleetMessage,
    PendingCalls,
    RemoteClient,
    client_of,
)
from shoal.cluster.fleet_trace import FleetTrace
from shoal.errors import ClosedError, ConfigError, RequestError, ShoalError, UserError
from shoal.log import get_logger
from shoal.process.forks import Owner
from shoal.transport.channel import Channel, ChannelClosed
from shoal.wire.base import WireError, encode, replace_fields
from shoal.wire.engine import (
    Abort,
    ControlCall,
    ControlReply,
    EngineRequest,
    Finish,
    RefusalKind,
    SeqUpdate,
    to_engine,
)
from shoal.wire.fleet import ContextLength, operation_decoder

log = get_logger("fleet")

_WAIT_S = 1.0
_TRACE_POLL_S = 0.02  # how often to look whether the file of a trace is complete
_MAX_PER_TURN = 64  # messages of one client that are handled before the next updates are sent
_BATCH_SIZE = 8  # messages of a local client that are one task
_JOIN_S = 10.0
_CLOSED = "the engine was closed"

Verb = Callable[[bytes], bytes]
"""A function that answers control calls of one verb, from payload to payload."""


class FleetServer:
    """The owner of a fleet: a thread that drives it and serves its clients.

    Clients may ask for `status`, `started`, `scale`, `drain`, `operate`, `start_profile`, `stop_profile` and further
    verbs.
    """

    def __init__(
        self,
        fleet: Fleet,
        verbs: Mapping[str, Verb] | None = None,
        *,
        trace: FleetTrace | None = None,
        unread_s: float = 60.0,
    ) -> None:
        """Take over a fleet, and start the thread.

        Args:
            verbs: further verbs. They run on the thread of the server, so they must be quick.
            trace: starts and ends traces of the fleet, which clients then may ask for.
            unread_s: a client in another process that has not read for so many seconds is given up.
        """
        self._fleet = fleet
        self._trace = trace
        self._unread_s = unread_s
        self._owner = Owner("AsyncLLM")
        self._verbs: dict[str, Verb] = {
            "status": lambda _: encode(fleet.status()),
            "started": lambda _: b"yes" if fleet.started else b"",
            "scale": self._scale,
            "drain": self._drain,
            "start_profile": self._start_trace,
            **(verbs or {}),
        }
        self._clients: dict[int, Client] = {}
        self._length: ContextLength | None = None  # what clients were told
        self._numbers = itertools.count()
        self._tasks: deque[Callable[[], object]] = deque()  # added by other threads
        self._lock = threading.Lock()
        self._ended = False  # True: no task is accepted any more
        self._closing = False
        self._failure = ""
        self._thread = threading.Thread(target=self._run, name="shoal-fleet", daemon=True)
        self._thread.start()

    def open(self, deliver: Callable[[FleetMessage], object]) -> FleetConnection:
        """Return a connection for a client in this process.

        `deliver` is called on the thread of the server, and must not block.
        """
        connection = _LocalConnection(self, deliver)
        self.do(lambda: self._enter(connection.client))
        return connection

    def connect(self, channel: Channel) -> None:
        """Serve a client at the other end of a channel, with the same messages. The channel is closed by the server."""
        remote = RemoteClient(next(self._numbers), channel, self._unread_s)

        def begin() -> None:
            self._enter(remote)
            self._fleet.watch(channel)

        self.do(begin)

    @property
    def num_clients(self) -> int:
        """The number of connections."""
        return len(self._clients)

    def new_client_number(self) -> int:
        return next(self._numbers)

    def do(self, task: Callable[[], object]) -> None:
        """Have a task done on the thread of the server.

        Raises:
            ClosedError: the server has ended, or was started by the process from which this one was forked.
        """
        self._owner.check()
        with self._lock:
            if self._ended or self._closing:
                raise ClosedError(self._failure or _CLOSED)
            self._tasks.append(task)
        self._fleet.wake()

    @property
    def failure(self) -> str:
        """The reason why the thread has failed; "" if it has not."""
        return self._failure

    def close(self) -> None:
        """End the thread and the fleet; in a forked child do nothing. Idempotent."""
        if not self._owner.is_here:
            return
        self._closing = True
        self._fleet.wake()
        self._thread.join(_JOIN_S)

    def _run(self) -> None:
        try:
            while not self._closing:
                self._run_some_tasks()
                ending = self._trace is not None and self._trace.is_ending
                self._hand_out(self._fleet.updates(_TRACE_POLL_S if ending else _WAIT_S))
                self._send_length()
                if self._trace is not None:
                    self._trace.tick()
                for client in list(self._clients.values()):
                    if isinstance(client, RemoteClient):
                        self._serve(client)
        except Exception as error:
            log.exception("the fleet server has failed")
            self._failure = f"the fleet server has failed: {type(error).__name__}: {error}"
        finally:
            self._end()

    def _run_all_tasks(self) -> None:
        for _ in range(len(self._tasks)):
            self._tasks.popleft()()

    def _run_some_tasks(self) -> None:
        """Do a few tasks, so that updates are handed out before the next tasks."""
        for _ in range(min(len(self._tasks), _MAX_PER_TURN // _BATCH_SIZE)):
            self._tasks.popleft()()
        if self._tasks:
            self._fleet.wake()

    def _end(self) -> None:
        """End all requests, connections and the fleet, whatever has failed."""
        with self._lock:
            self._ended = True
        try:
            self._run_all_tasks()
        except Exception:
            log.exception("some tasks were not done")
        for client in list(self._clients.values()):
            lost = [self._lost(seq) for seq in client.requests]
            with contextlib.suppress(Exception):  # the thread or loop of the client may have ended too
                client.send_updates(*lost)
            with contextlib.suppress(Exception):
                client.end()
        if self._trace is not None:
            try:
                self._trace.close()
            except Exception:
                log.exception("the trace was not ended")
        self._fleet.close()

    def _lost(self, seq: int) -> SeqUpdate:
        refusal = RefusalKind.LOST if self._failure else RefusalKind.CLOSING
        return _refused(seq, self._failure or _CLOSED, refusal)

    def _enter(self, client: Client) -> None:
        self._clients[client.number] = client
        if self._length is not None:
            client.send(self._length)

    def _send_length(self) -> None:
        """Tell all clients the context length, as soon as the fleet knows it."""
        if self._length is None and self._fleet.max_model_len is not None:
            self._length = ContextLength(self._fleet.max_model_len)
            for client in self._clients.values():
                client.send(self._length)

    def leave(self, client: Client) -> None:
        """Forget a client, and abort its requests. Idempotent."""
        if self._clients.pop(client.number, None) is not None:
            self._fleet.abort(list(client.requests))

    def take(self, client: Client, message: Any) -> None:
        """Handle a message of a client.

        Raises:
            WireError: clients send no such messages.
        """
        match message:
            case EngineRequest():
                self._take_request(client, message)
            case Abort():
                seqs = [client.number_in_fleet(seq) for seq in message.seqs]
                self._fleet.abort(seqs, stopped=message.stopped)
            case ControlCall() if message.verb == "operate" and not self._ended:
                self._operate(client, message)
            case ControlCall() if message.verb == "stop_profile" and self._trace is not None and not self._ended:
                self._trace.stop(_answer_later(client, message))
            case ControlCall():
                client.send(self._answer(message))
            case _:
                raise WireError(f"a client sent a {type(message).__name__}")

    def _take_request(self, client: Client, request: EngineRequest) -> None:
        seq = client.number_in_fleet(request.seq)
        if self._ended:
            client.send_updates(self._lost(seq))
            return
        group = client.number_in_fleet(request.group) if request.group >= 0 else -1
        try:
            self._fleet.add(replace_fields(request, seq=seq, group=group))
        except RequestError as error:
            client.send_updates(SeqUpdate.invalid(seq, error))
        except ShoalError as error:
            client.send_updates(_refused(seq, str(error), RefusalKind.FAILED))
        except Exception as error:
            log.exception("request %d could not be accepted", seq)
            client.requests.add(seq)
            why = f"the request could not be accepted: {type(error).__name__}: {error}"
            if not self._fleet.refuse(seq, why):
                client.requests.discard(seq)
                client.send_updates(_refused(seq, why, RefusalKind.FAILED))
        else:
            client.requests.add(seq)

    def _answer(self, call: ControlCall) -> ControlReply:
        verb = self._verbs.get(call.verb)
        if verb is None:
            return ControlReply(call.id, error=f"there is no verb {call.verb!r}")
        if self._ended:
            return ControlReply(call.id, error=self._failure or _CLOSED)
        try:
            return ControlReply(call.id, verb(call.payload))
        except ShoalError as error:
            return ControlReply(call.id, error=str(error), user_error=isinstance(error, UserError))
        except Exception as error:
            log.exception("%s could not be answered", call.verb)
            return ControlReply(call.id, error=f"{call.verb} could not be answered: {type(error).__name__}: {error}")

    def _operate(self, client: Client, call: ControlCall) -> None:
        """Begin an operation. The call is answered when it has ended."""
        done = _answer_later(client, call)
        wanted = operation_decoder.decode(call.payload)
        log.info("a client asked for %s (%s)", wanted.verb, wanted)
        try:
            self._fleet.operate(wanted, done)
        except ShoalError as error:
            done(error)

    def _start_trace(self, _: bytes) -> bytes:
        if self._trace is None:
            raise ConfigError("this fleet records no traces")
        self._trace.start()
        return b""

    def _scale(self, payload: bytes) -> bytes:
        if not payload.isdigit():
            raise ConfigError(f"scale needs a number of replicas, got {payload[:40]!r}")
        self._fleet.scale(int(payload))
        return encode(self._fleet.status())

    def _drain(self, _: bytes) -> bytes:
        self._fleet.drain()
        return str(self._fleet.num_unfinished).encode()

    def _hand_out(self, updates: Sequence[SeqUpdate]) -> None:
        """Send each client its updates. They are not copied: the envelope has the base of the client's numbers."""
        by_client: dict[int, list[SeqUpdate]] = {}
        for update in updates:
            by_client.setdefault(client_of(update.seq), []).append(update)
        for number, some in by_client.items():
            client = self._clients.get(number)
            if client is None:
                continue
            client.requests.difference_update([update.seq for update in some if update.finish is not None])
            client.send_updates(*some)

    def _serve(self, client: RemoteClient) -> None:
        """Handle what a client in another process has sent, and send it what it can read."""
        try:
            client.receive()
            for _ in range(min(len(client.received), _MAX_PER_TURN)):
                self.take(client, to_engine.decode(client.received.popleft()))
            if client.received:
                self._fleet.wake()
            client.flush()
        except (ChannelClosed, WireError) as error:
            log_line = log.warning if client.requests or isinstance(error, WireError) else log.info
            log_line("an API server has gone (%s); its %d requests are given up", error, len(client.requests))
            self._fleet.unwatch(client.channel)
            self.leave(client)
            client.channel.close()


class _LocalConnection:
    """The connection of a client in this process."""

    def __init__(self, server: FleetServer, deliver: Callable[[FleetMessage], object]) -> None:
        self._server = server
        self._calls = PendingCalls()
        self._deliver = deliver
        self.client = Client(server.new_client_number(), self._receive, self._fail_calls)

    def _receive(self, message: FleetMessage) -> None:
        if isinstance(message, ControlReply):
            self._calls.answer(message)
        else:
            self._deliver(message)

    def _fail_calls(self) -> None:
        self._calls.fail(self._server.failure or _CLOSED)

    def send(self, messages: Sequence[EngineRequest | Abort]) -> None:
        for start in range(0, len(messages) or 1, _BATCH_SIZE):
            self._server.do(partial(self._take, messages[start : start + _BATCH_SIZE]))

    def _take(self, messages: Sequence[EngineRequest | Abort]) -> None:
        for message in messages:
            self._server.take(self.client, message)

    def ask(self, verb: str, payload: bytes = b"") -> "Future[bytes]":
        call, future = self._calls.add(verb, payload)
        try:
            self._server.do(lambda: self._server.take(self.client, call))
        except ClosedError as error:
            self._calls.fail(str(error))
        return future

    def close(self) -> None:
        with contextlib.suppress(ClosedError):
            self._server.do(lambda: self._server.leave(self.client))


def _answer_later(client: Client, call: ControlCall) -> Callable[[bytes | ShoalError], object]:
    """Return a function that answers a call with its outcome."""

    def done(outcome: bytes | ShoalError) -> None:
        if isinstance(outcome, ShoalError):
            client.send(ControlReply(call.id, error=str(outcome), user_error=isinstance(outcome, UserError)))
        else:
            client.send(ControlReply(call.id, outcome))

    return done


def _refused(seq: int, error: str, refusal: RefusalKind) -> SeqUpdate:
    return SeqUpdate(seq, (), finish=Finish.ABORT, error=error, refusal=refusal)
