"""The desk: the thread that drives a fleet, and the connections to it of clients in this process and in others.

Clients number their requests from 0. In the fleet each connection has a range of numbers, which begins at its `base`:
that is added to the numbers of a request when it comes in, and written on the envelope of updates that go out.
"""

import contextlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Protocol

from shoal.cluster.fleet import Fleet
from shoal.errors import ClosedError, ConfigError, EngineError, RequestError, ShoalError, UserError
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
    Updates,
    to_engine,
)
from shoal.wire.fleet import ContextLength, operation_decoder

log = get_logger("desk")

_OWN_BITS = 40  # of a request's number are the client's own; the bits above them number the connection
_WAIT_S = 1.0
_AT_A_TIME = 64  # requests that are taken in one turn, before what replicas say is handed out
_TOGETHER = 8  # ... of a client that brings many at once
_JOIN_S = 10.0
_LAST_WORDS_S = 1.0
_CLOSED = "the engine was closed"

Verb = Callable[[bytes], bytes]
Message = EngineRequest | Abort | ControlCall
Answer = Updates | ContextLength | ControlReply


class FleetConnection(Protocol):
    """A client's way to a fleet. `send` and `ask` may be called from any thread."""

    def send(self, messages: Sequence[EngineRequest | Abort]) -> None:
        """Hands them over together. Never blocks.

        Raises:
            ClosedError: nobody is there any more.
        """

    def ask(self, verb: str, payload: bytes = b"") -> "Future[bytes]":
        """The future's exception is a UserError or an EngineError."""

    def close(self) -> None:
        """Ends the line, and with it all its requests. Idempotent."""


class Questions:
    """Asked, and not answered yet. For implementations of `FleetConnection`."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._open: dict[int, Future[bytes]] = {}

    def add(self, verb: str, payload: bytes) -> tuple[ControlCall, "Future[bytes]"]:
        number = next(self._numbers)
        future: Future[bytes] = Future()
        self._open[number] = future
        return ControlCall(number, verb, payload), future

    def answer(self, told: ControlReply) -> None:
        future = self._open.pop(told.id, None)
        if future is None or not future.set_running_or_notify_cancel():
            return
        if told.error:
            future.set_exception(UserError(told.error) if told.user_error else EngineError(told.error))
        else:
            future.set_result(told.payload)

    def fail(self, why: str) -> None:
        """Nobody answers any more."""
        for number in list(self._open):
            future = self._open.pop(number, None)
            if future is not None and future.set_running_or_notify_cancel():
                future.set_exception(ClosedError(why))


class _Client:
    """A connection, as the desk sees it. `say` hands an answer over and never blocks; `end` is the last call of all."""

    def __init__(self, number: int, say: Callable[[Answer], object], end: Callable[[], object]) -> None:
        self.number = number
        self.base = number << _OWN_BITS
        self.say = say
        self.end = end
        self.requests: set[int] = set()  # by their numbers in the fleet

    def in_fleet(self, seq: int) -> int:
        """Return the number in the fleet of what this client has numbered `seq`.

        Raises:
            WireError: a client can't have such a number.
        """
        if not 0 <= seq < 1 << _OWN_BITS:
            raise WireError(f"a client numbered a request {seq}")
        return self.base + seq

    def update(self, *updates: SeqUpdate) -> None:
        """Hand over updates, which have the fleet's numbers."""
        self.say(Updates(updates, self.base))


class Desk:
    """Takes over a fleet. `verbs` are what clients may ask for beside `status`, `started`, `scale`, `drain` and
    `operate`; those run on the desk's thread and must be quick. What `operate` begins is answered when it has ended.
    A client in another process that has not read for `unread_s` seconds is given up."""

    def __init__(self, fleet: Fleet, verbs: Mapping[str, Verb] | None = None, *, unread_s: float = 60.0) -> None:
        self._fleet = fleet
        self._unread_s = unread_s
        self._owner = Owner("AsyncLLM")
        self._verbs: dict[str, Verb] = {
            "status": lambda _: encode(fleet.status()),
            "started": lambda _: b"yes" if fleet.started else b"",
            "scale": self._scale,
            "drain": self._drain,
            **(verbs or {}),
        }
        self._clients: dict[int, _Client] = {}
        self._length: ContextLength | None = None  # what clients were told
        self._numbers = itertools.count()
        self._todo: deque[Callable[[], object]] = deque()  # by other threads, for this one
        self._lock = threading.Lock()
        self._ended = False  # nothing that is to be done is taken any more
        self._closing = False
        self._failure = ""
        self._thread = threading.Thread(target=self._run, name="shoal-desk", daemon=True)
        self._thread.start()

    def open(self, deliver: Callable[[Answer], object]) -> FleetConnection:
        """A line for a client in this process. `deliver` is called on the desk's thread and must not block."""
        line = _LocalLine(self, deliver)
        self.do(lambda: self._enter(line.client))
        return line

    def connect(self, channel: Channel) -> None:
        """A line for a client at the other end of a channel, which speaks the same messages."""
        remote = _RemoteClient(next(self._numbers), channel, self._unread_s)

        def begin() -> None:
            self._enter(remote)
            self._fleet.watch(channel)

        self.do(begin)

    @property
    def num_clients(self) -> int:
        """The number of connections."""
        return len(self._clients)

    def new_number(self) -> int:
        return next(self._numbers)

    def do(self, task: Callable[[], object]) -> None:
        """Has the desk's thread do it.

        Raises:
            ClosedError: it has ended, or is a thread of the process from which this one was forked.
        """
        self._owner.check()
        with self._lock:
            if self._ended or self._closing:
                raise ClosedError(self._failure or _CLOSED)
            self._todo.append(task)
        self._fleet.wake()

    @property
    def failure(self) -> str:
        """Why its thread has ended by itself; "" if it has not."""
        return self._failure

    def close(self) -> None:
        """Ends the fleet; in a forked child it does nothing. Idempotent."""
        if not self._owner.is_here:
            return
        self._closing = True
        self._fleet.wake()
        self._thread.join(_JOIN_S)

    def _run(self) -> None:
        try:
            while not self._closing:
                self._do_some()
                self._hand_out(self._fleet.updates(_WAIT_S))
                self._tell_length()
                for client in list(self._clients.values()):
                    if isinstance(client, _RemoteClient):
                        self._attend_to(client)
        except Exception as error:
            log.exception("the engine's thread has failed")
            self._failure = f"the engine's thread has failed: {type(error).__name__}: {error}"
        finally:
            self._end()

    def _do_all(self) -> None:
        for _ in range(len(self._todo)):  # what is added meanwhile waits for its turn
            self._todo.popleft()()

    def _do_some(self) -> None:
        """The rest waits for its turn as well."""
        for _ in range(min(len(self._todo), _AT_A_TIME // _TOGETHER)):
            self._todo.popleft()()
        if self._todo:
            self._fleet.wake()

    def _end(self) -> None:
        """Whoever still waits is told, whatever has happened here."""
        with self._lock:
            self._ended = True
        try:
            self._do_all()
        except Exception:
            log.exception("something was left undone")
        for client in list(self._clients.values()):
            lost = [self._lost(seq) for seq in client.requests]
            with contextlib.suppress(Exception):  # its thread or loop may have ended as well
                client.update(*lost)
            with contextlib.suppress(Exception):
                client.end()
        self._fleet.close()

    def _lost(self, seq: int) -> SeqUpdate:
        refusal = RefusalKind.LOST if self._failure else RefusalKind.CLOSING
        return _refused(seq, self._failure or _CLOSED, refusal)

    def _enter(self, client: _Client) -> None:
        self._clients[client.number] = client
        if self._length is not None:
            client.say(self._length)

    def _tell_length(self) -> None:
        """Tell all clients how long requests may be, as soon as the fleet knows it."""
        if self._length is None and self._fleet.max_model_len is not None:
            self._length = ContextLength(self._fleet.max_model_len)
            for client in self._clients.values():
                client.say(self._length)

    def leave(self, client: _Client) -> None:
        if self._clients.pop(client.number, None) is not None:
            self._fleet.abort(list(client.requests))

    def take(self, client: _Client, message: Any) -> None:
        """
        Raises:
            WireError: nobody sends such a thing.
        """
        match message:
            case EngineRequest():
                self._take_request(client, message)
            case Abort():
                seqs = [client.in_fleet(seq) for seq in message.seqs]
                self._fleet.abort(seqs, stopped=message.stopped)
            case ControlCall() if message.verb == "operate" and not self._ended:
                self._operate(client, message)
            case ControlCall():
                client.say(self._answer(message))
            case _:
                raise WireError(f"a client sent a {type(message).__name__}")

    def _take_request(self, client: _Client, request: EngineRequest) -> None:
        seq = client.in_fleet(request.seq)
        if self._ended:
            client.update(self._lost(seq))
            return
        group = client.in_fleet(request.group) if request.group >= 0 else -1
        try:
            self._fleet.add(replace_fields(request, seq=seq, group=group))
        except RequestError as error:
            client.update(SeqUpdate.invalid(seq, error))
        except ShoalError as error:
            client.update(_refused(seq, str(error), RefusalKind.FAILED))
        except Exception as error:
            log.exception("request %d could not be taken", seq)
            client.requests.add(seq)
            why = f"the request could not be taken: {type(error).__name__}: {error}"
            if not self._fleet.refuse(seq, why):
                client.requests.discard(seq)
                client.update(_refused(seq, why, RefusalKind.FAILED))
        else:
            client.requests.add(seq)

    def _answer(self, ask: ControlCall) -> ControlReply:
        verb = self._verbs.get(ask.verb)
        if verb is None:
            return ControlReply(ask.id, error=f"nobody knows {ask.verb!r} here")
        if self._ended:
            return ControlReply(ask.id, error=self._failure or _CLOSED)
        try:
            return ControlReply(ask.id, verb(ask.payload))
        except ShoalError as error:
            return ControlReply(ask.id, error=str(error), user_error=isinstance(error, UserError))
        except Exception as error:
            log.exception("%s could not be answered", ask.verb)
            return ControlReply(ask.id, error=f"{ask.verb} could not be answered: {type(error).__name__}: {error}")

    def _operate(self, client: _Client, ask: ControlCall) -> None:
        def done(outcome: bytes | ShoalError) -> None:
            if isinstance(outcome, ShoalError):
                client.say(ControlReply(ask.id, error=str(outcome), user_error=isinstance(outcome, UserError)))
            else:
                client.say(ControlReply(ask.id, outcome))

        wanted = operation_decoder.decode(ask.payload)
        log.info("%s is asked for (%s)", wanted.verb, wanted)
        try:
            self._fleet.operate(wanted, done)
        except ShoalError as error:
            done(error)

    def _scale(self, payload: bytes) -> bytes:
        if not payload.isdigit():
            raise ConfigError(f"a number of replicas is wanted, not {payload[:40]!r}")
        self._fleet.scale(int(payload))
        return encode(self._fleet.status())

    def _drain(self, _: bytes) -> bytes:
        self._fleet.drain()
        return str(self._fleet.num_unfinished).encode()

    def _hand_out(self, updates: Sequence[SeqUpdate]) -> None:
        """Sort updates by client. They are not copied: a client finds its own numbers by the envelope's base."""
        by_client: dict[int, list[SeqUpdate]] = {}
        for update in updates:
            by_client.setdefault(update.seq >> _OWN_BITS, []).append(update)
        for number, some in by_client.items():
            client = self._clients.get(number)
            if client is None:
                continue
            client.requests.difference_update([update.seq for update in some if update.finish is not None])
            client.update(*some)

    def _attend_to(self, client: "_RemoteClient") -> None:
        try:
            client.hear()
            for _ in range(min(len(client.heard), _AT_A_TIME)):
                self.take(client, to_engine.decode(client.heard.popleft()))
            if client.heard:
                self._fleet.wake()
            client.flush()
        except (ChannelClosed, WireError) as error:
            say = log.warning if client.requests or isinstance(error, WireError) else log.info
            say("an API server has gone (%s); its %d requests are given up", error, len(client.requests))
            self._fleet.unwatch(client.channel)
            self.leave(client)
            client.channel.close()


class _LocalLine:
    def __init__(self, desk: Desk, deliver: Callable[[Answer], object]) -> None:
        self._desk = desk
        self._questions = Questions()
        self._deliver = deliver
        self.client = _Client(desk.new_number(), self._say, lambda: self._questions.fail(desk.failure or _CLOSED))

    def _say(self, answer: Answer) -> None:
        if isinstance(answer, ControlReply):
            self._questions.answer(answer)
        else:
            self._deliver(answer)

    def send(self, messages: Sequence[EngineRequest | Abort]) -> None:
        for start in range(0, len(messages) or 1, _TOGETHER):
            self._desk.do(partial(self._take, messages[start : start + _TOGETHER]))

    def _take(self, messages: Sequence[EngineRequest | Abort]) -> None:
        for message in messages:
            self._desk.take(self.client, message)

    def ask(self, verb: str, payload: bytes = b"") -> "Future[bytes]":
        question, future = self._questions.add(verb, payload)
        try:
            self._desk.do(lambda: self._desk.take(self.client, question))
        except ClosedError as error:
            self._questions.fail(str(error))
        return future

    def close(self) -> None:
        with contextlib.suppress(ClosedError):
            self._desk.do(lambda: self._desk.leave(self.client))


class _RemoteClient(_Client):
    """One that reads slowly, or not for a while, is sent the rest in larger pieces when it has read the one before."""

    def __init__(self, number: int, channel: Channel, unread_s: float) -> None:
        super().__init__(number, self._send, self._hang_up)
        self.channel = channel
        self.heard: deque[bytes] = deque()  # frames that are not dealt with yet
        self._unsent: list[SeqUpdate] = []
        self._unread_since: float | None = None
        self._unread_s = unread_s

    def _send(self, answer: Answer) -> None:
        if isinstance(answer, Updates):
            self._unsent += answer.updates
        with contextlib.suppress(ChannelClosed):  # its end is read, and dealt with, in turn
            if not isinstance(answer, Updates):
                self.channel.send(encode(answer))
            self.flush()

    def flush(self) -> None:
        """
        Raises:
            ChannelClosed: it does not read what it was sent.
        """
        if not self.channel.backlog:
            self._unread_since = None
            if self._unsent:
                updates, self._unsent = self._unsent, []
                self.channel.send(encode(Updates(tuple(updates), self.base)))
        elif self._unread_since is None:
            self._unread_since = time.monotonic()
        elif time.monotonic() - self._unread_since > self._unread_s:
            raise ChannelClosed(f"it has not read for {self._unread_s:g} s")

    def hear(self) -> None:
        """Takes in what has come, once all that came before is dealt with.

        Raises:
            ChannelClosed: it has gone.
        """
        if not self.heard:
            self.heard.extend(self.channel.receive())

    def _hang_up(self) -> None:
        deadline = time.monotonic() + _LAST_WORDS_S
        while (self._unsent or self.channel.backlog) and (left := deadline - time.monotonic()) > 0:
            self.channel.flush(left)
            self.flush()
        self.channel.close()


def _refused(seq: int, error: str, refusal: RefusalKind) -> SeqUpdate:
    return SeqUpdate(seq, (), finish=Finish.ABORT, error=error, refusal=refusal)
