"""The server of a fleet, with clients in this process and clients at channels."""

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from shoal.cluster.fleet import Fleet, ModelSummary
from shoal.cluster.fleet_connections import FleetMessage
from shoal.cluster.fleet_server import FleetServer
from shoal.cluster.limits import FleetLimits
from shoal.cluster.routing.capacity import ReplicaCapacity
from shoal.errors import ClosedError, ConfigError, EngineError, UserError
from shoal.transport.channel import Channel, ChannelClosed, wait
from shoal.wire.base import Stop, Wire, encode, replace_fields
from shoal.wire.engine import Abort, ControlCall, ControlReply, EngineRequest, Finish, RefusalKind, SeqUpdate, Updates
from shoal.wire.fleet import ContextLength, fleet_status_decoder, to_api
from support.fake_replica import FakeReplica
from support.fakes import Outcomes, alone, request

DEADLINE_S = 60.0


class ReadableChannel:
    """A channel that is always readable."""

    backlog = False

    def __init__(self) -> None:
        self._fd = os.eventfd(1, os.EFD_CLOEXEC)

    def fileno(self) -> int:
        return self._fd


READABLE_CHANNEL = ReadableChannel()


class RecordingReplica(FakeReplica):
    """A replica that keeps its updates in `sent`."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.sent: list[SeqUpdate] = []

    @property
    def channel(self) -> Any:
        return READABLE_CHANNEL

    def updates(self, timeout: float) -> list[SeqUpdate]:
        found = super().updates(timeout)
        self.sent += found
        return found


class ServedFleet:
    """A fleet with one fake replica, and its server."""

    def __init__(self, unread_s: float = 60.0) -> None:
        self.replica = RecordingReplica(0)
        self.fleet = Fleet(
            lambda number, generation: self.replica,
            lambda stats: ReplicaCapacity(100, 10**6, 4, 100),
            model=ModelSummary("model", 1, 1),
            limits=FleetLimits(1000, None, None, 5, 60.0),
            local=[0],
        )
        self.server = FleetServer(
            self.fleet, {"shout": bytes.upper, "fail": self._fail, "break": self._break}, unread_s=unread_s
        )

        self.channels: list[Channel] = []

    def local(self) -> "LocalClient":
        return LocalClient(self.server)

    def remote(self) -> "RemoteClient":
        client = RemoteClient(self.server)
        self.channels.append(client.channel)
        return client

    def _fail(self, payload: bytes) -> bytes:
        raise ConfigError("not like that")

    def _break(self, payload: bytes) -> bytes:
        raise KeyError("a bug")

    def on_thread(self, what: Callable[[], Any]) -> Any:
        """Return what a function returns on the thread of the server."""
        found: queue.Queue[Any] = queue.Queue()
        self.server.do(lambda: found.put(what()))
        return found.get(timeout=DEADLINE_S)

    def until(self, what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not self.on_thread(what):
            assert time.monotonic() < deadline


@pytest.fixture
def served(request: pytest.FixtureRequest) -> Iterator[ServedFleet]:
    """A test may set `unread_s` as the parameter of this fixture."""
    found = ServedFleet(getattr(request, "param", 60.0))
    yield found
    found.server.close()
    for channel in found.channels:
        channel.close()


def own_numbers(envelope: Updates) -> list[SeqUpdate]:
    """Return updates with the client's own numbers."""
    return [replace_fields(update, seq=update.seq - envelope.base) for update in envelope.updates]


class LocalClient:
    def __init__(self, server: FleetServer) -> None:
        self.got: queue.Queue[FleetMessage] = queue.Queue()
        self.length: int | None = None
        self.connection = server.open(self._receive)
        self.outcomes = Outcomes()

    def _receive(self, message: FleetMessage) -> None:
        if isinstance(message, ContextLength):
            self.length = message.max_model_len
        else:
            self.got.put(message)

    def add(self, *specs: EngineRequest) -> None:
        for spec in specs:
            self.outcomes.added(spec)
        self.connection.send(specs)

    def next(self) -> list[SeqUpdate]:
        found = self.got.get(timeout=DEADLINE_S)
        assert isinstance(found, Updates)
        return own_numbers(found)

    def finish(self) -> None:
        while self.outcomes.open:
            self.outcomes.take(self.next())


class RemoteClient(LocalClient):
    def __init__(self, server: FleetServer) -> None:
        self.server_end, ours = Channel.pair()
        self.channel = Channel(ours)
        self.outcomes = Outcomes()
        self.replies: dict[int, ControlReply] = {}
        self.length = None
        server.connect(self.server_end)

    def send(self, *messages: Wire) -> None:
        for message in messages:
            self.channel.send(encode(message))

    def add(self, *specs: EngineRequest) -> None:
        for spec in specs:
            self.outcomes.added(spec)
        self.send(*specs)

    def next(self) -> list[SeqUpdate]:
        assert wait([self.channel], DEADLINE_S)
        found: list[SeqUpdate] = []
        for frame in self.channel.receive():
            message = to_api.decode(frame)
            if isinstance(message, ControlReply):
                self.replies[message.id] = message
            elif isinstance(message, ContextLength):
                self.length = message.max_model_len
            else:
                assert isinstance(message, Updates)
                found += own_numbers(message)
        return found

    def read_to_the_end(self) -> None:
        """Read messages for ever.

        Raises:
            ChannelClosed: the server has closed the connection.
        """
        while True:
            self.next()

    def ask(self, number: int, verb: str, payload: bytes = b"") -> ControlReply:
        self.send(ControlCall(number, verb, payload))
        while number not in self.replies:
            assert not self.next()
        return self.replies[number]


def test_each_client_gets_its_own_updates(served: ServedFleet) -> None:
    """All clients number their requests and groups from 0."""
    clients = [served.local(), served.remote(), served.local()]
    clients.append(served.remote())
    for number, client in enumerate(clients):
        client.add(*(request(seq, [number, seq], 5 + number, group=0) for seq in range(4)))
    for client in clients:
        client.finish()
        assert client.outcomes.tokens == {seq: alone(spec) for seq, spec in client.outcomes.specs.items()}
    assert len({spec.group for spec in served.replica.added}) == 4
    served.on_thread(served.fleet.audit)


def test_clients_are_told_the_context_length(served: ServedFleet) -> None:
    """They are told as soon as the fleet knows it, or when they connect if that is later."""
    for client in (served.local(), served.remote(), served.local()):
        client.add(request(0, [1], 5))
        client.finish()
        assert client.length == served.on_thread(lambda: served.fleet.max_model_len)
        assert client.length is not None


def test_updates_are_passed_on_and_not_copied(served: ServedFleet) -> None:
    first, second = served.local(), served.local()
    for client in (first, second):
        client.connection.send([request(3, [1], 5)])
    got: list[SeqUpdate] = []
    for client in (first, second):
        while not (got and got[-1].finish is not None):
            envelope = client.got.get(timeout=DEADLINE_S)
            assert isinstance(envelope, Updates)
            got += envelope.updates
            assert {update.seq - envelope.base for update in envelope.updates} == {3}
        served.until(lambda: len(served.replica.sent) >= 10)
        assert all(any(update is sent for sent in served.replica.sent) for update in got)
        got.clear()


def test_a_client_can_only_abort_its_own_requests(served: ServedFleet) -> None:
    local, remote = served.local(), served.remote()
    local.add(request(0, [1], 200))
    remote.outcomes.may_abort.add(0)
    remote.add(request(0, [2], 250))
    remote.send(Abort((0, 7)))
    remote.finish()
    local.finish()
    assert local.outcomes.finished[0].finish is Finish.LENGTH


@pytest.mark.parametrize("garbage", [None, b"\xff\xff", encode(Stop()), encode(Abort((-1,)))])
def test_requests_of_a_client_end_if_it_goes_or_sends_malformed_data(
    served: ServedFleet, garbage: bytes | None
) -> None:
    gone, stays = served.remote(), served.remote()
    gone.send(*(request(seq, [seq], 10**7) for seq in range(5)))
    stays.add(request(0, [3], 20))
    served.until(lambda: len(served.replica.added) == 6)
    if garbage is None:
        gone.channel.close()
    else:
        gone.channel.send(garbage)
    served.until(lambda: served.fleet.num_unfinished <= 1)
    stays.finish()
    served.until(lambda: not served.replica.held)
    served.on_thread(served.fleet.audit)
    if garbage is not None:
        with pytest.raises(ChannelClosed):
            gone.read_to_the_end()


def test_requests_of_a_closed_connection_end(served: ServedFleet) -> None:
    client = served.local()
    client.connection.send([request(0, [1], 10**7)])
    served.until(lambda: bool(served.replica.held))
    client.connection.close()
    client.connection.close()
    served.until(lambda: not served.replica.held)


def test_control_calls(served: ServedFleet) -> None:
    local, remote = served.local(), served.remote()
    assert local.connection.ask("shout", b"abc").result(DEADLINE_S) == b"ABC"
    assert remote.ask(7, "shout", b"x") == ControlReply(7, b"X")
    status = fleet_status_decoder.decode(local.connection.ask("status").result(DEADLINE_S))
    assert status.model == "model"
    with pytest.raises(UserError, match="not like that"):
        local.connection.ask("fail").result(DEADLINE_S)
    with pytest.raises(EngineError, match="break could not be answered: KeyError: 'a bug'"):
        local.connection.ask("break").result(DEADLINE_S)
    with pytest.raises(EngineError, match="there is no verb 'sing'"):
        local.connection.ask("sing").result(DEADLINE_S)
    for payload in (b"many", b"", b"-1"):
        with pytest.raises(UserError, match="a number of replicas"):
            local.connection.ask("scale", payload).result(DEADLINE_S)
    assert remote.ask(8, "fail").user_error
    assert not remote.ask(9, "break").user_error
    assert local.connection.ask("drain").result(DEADLINE_S) == b"0"
    local.connection.send([request(0, [1])])
    assert local.next()[0].refusal is RefusalKind.CLOSING


def test_a_number_that_is_used_twice_ends_the_second_request_only(served: ServedFleet) -> None:
    client = served.local()
    client.connection.send([request(0, [1], 10**7), request(0, [2])])
    while not (refused := [update for update in client.next() if update.error]):
        pass
    assert refused[0].refusal is RefusalKind.INVALID
    client.connection.close()
    served.until(lambda: not served.replica.held)


def test_a_request_that_cannot_be_accepted_ends_alone(served: ServedFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    client = served.local()
    add = served.fleet.add

    def failing_add(spec: EngineRequest) -> None:
        if len(spec.tokens) > 4:
            raise OverflowError("too large a number")
        add(spec)

    monkeypatch.setattr(served.fleet, "add", failing_add)
    client.connection.send([request(0, [1, 2]), request(1, [1])])
    (refused,) = client.next()
    assert (refused.seq, refused.refusal) == (0, RefusalKind.FAILED)
    assert "could not be accepted: OverflowError" in refused.error
    while not any(update.finish is Finish.LENGTH for update in client.next()):
        pass
    served.on_thread(served.fleet.audit)


@pytest.mark.parametrize("busy", [False, True])
def test_the_end_of_an_api_server_is_a_warning_if_it_had_requests(
    served: ServedFleet, caplog: pytest.LogCaptureFixture, busy: bool
) -> None:
    remote = served.remote()
    if busy:
        remote.send(request(0, [1], 10**7))
        served.until(lambda: bool(served.replica.held))
    served.until(lambda: bool(served.server.num_clients))
    remote.channel.close()
    served.until(lambda: not served.server.num_clients)
    said = [each for each in caplog.records if "an API server has gone" in each.message]
    assert [each.levelname for each in said] == (["WARNING"] if busy else [])


def test_a_call_may_be_cancelled(served: ServedFleet) -> None:
    client = served.local()
    held = threading.Event()
    served.server.do(lambda: held.wait(DEADLINE_S))
    future = client.connection.ask("status")
    assert future.cancel()
    held.set()
    assert client.connection.ask("shout", b"a").result(DEADLINE_S) == b"A"


def test_if_the_thread_fails_all_requests_and_calls_end_with_the_reason(
    served: ServedFleet, caplog: pytest.LogCaptureFixture
) -> None:
    local, remote = served.local(), served.remote()
    local.connection.send([request(0, [1], 10**7)])
    remote.send(request(0, [2], 10**7))
    served.until(lambda: len(served.replica.held) == 2)
    held = threading.Event()
    served.server.do(lambda: held.wait(DEADLINE_S))
    served.server.do(lambda: dict[str, str]()["a bug"])
    late = local.connection.ask("status")
    local.connection.send([request(1, [1])])
    held.set()
    with pytest.raises(EngineError, match="the fleet server has failed: KeyError"):
        late.result(DEADLINE_S)
    ends: dict[int, SeqUpdate] = {}
    while len(ends) < 2:
        ends |= {update.seq: update for update in local.next() if update.finish is not None}
    while not (theirs := [update for update in remote.next() if update.finish is not None]):
        pass
    for update in (*ends.values(), *theirs):
        assert update.refusal is RefusalKind.LOST
        assert "the fleet server has failed: KeyError: 'a bug'" in update.error
    with pytest.raises(ClosedError, match="has failed: KeyError"):
        local.connection.send([request(2, [1])])
    with pytest.raises(ClosedError):
        local.connection.ask("status").result(DEADLINE_S)
    with pytest.raises(ChannelClosed):
        remote.read_to_the_end()
    served.server.close()
    assert served.replica.closed


def test_close_ends_all_requests_and_connections(served: ServedFleet) -> None:
    local, remote = served.local(), served.remote()
    local.connection.send([request(0, [1], 10**7)])
    remote.send(request(0, [2], 10**7))
    served.until(lambda: len(served.replica.held) == 2)
    served.server.close()
    served.server.close()
    for client in (local, remote):
        while not (ends := [update for update in client.next() if update.finish is not None]):
            pass
        assert [(update.seq, update.refusal, update.error) for update in ends] == [
            (0, RefusalKind.CLOSING, "the engine was closed")
        ]
    with pytest.raises(ClosedError, match="was closed"):
        local.connection.send([])
    local.connection.close()


def fill(channel: Channel) -> None:
    """Fill a channel until it cannot take more before the other end reads."""
    while not channel.backlog:
        channel.send(encode(ControlReply(10**6, bytes(1 << 16))))


def test_a_client_that_does_not_read_for_a_while_misses_nothing_and_delays_no_other(served: ServedFleet) -> None:
    remote, local = served.remote(), served.local()
    served.on_thread(lambda: fill(remote.server_end))
    remote.add(*(request(seq, [seq], 60) for seq in range(10)))
    local.add(*(request(seq, [seq], 90) for seq in range(10)))
    local.finish()
    served.until(lambda: not served.replica.held)
    remote.finish()
    served.on_thread(served.fleet.audit)


@pytest.mark.parametrize("served", [0.05], indirect=True)
def test_a_client_that_never_reads_is_given_up(served: ServedFleet) -> None:
    remote = served.remote()
    served.on_thread(lambda: fill(remote.server_end))
    remote.send(request(0, [1], 10**7))
    served.until(lambda: bool(served.replica.added))
    served.until(lambda: not served.replica.held)
    served.until(lambda: not served.server.num_clients)


def test_a_channel_may_be_closed_at_any_time(served: ServedFleet) -> None:
    """The process that started an API server may end it, and close its channel."""
    remote, local = served.remote(), served.local()
    remote.send(request(0, [1], 10**7))
    served.until(lambda: bool(served.replica.held))
    remote.server_end.close()
    served.until(lambda: not served.replica.held)
    local.add(request(0, [1]))
    local.finish()


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_many_requests_at_once_do_not_delay_updates(served: ServedFleet, kind: str) -> None:
    """Requests are accepted a few at a time, and updates are handed out in between."""
    waiting: list[int] = []
    ended = threading.Event()

    def deliver(message: FleetMessage) -> None:
        if isinstance(message, ContextLength):
            return
        assert isinstance(message, Updates)
        waiting.append(served.fleet.num_unfinished)
        if any(update.finish is not None for update in message.updates):
            ended.set()

    connection = served.server.open(deliver)
    specs = [request(seq, [seq + 1], 1) for seq in range(1000)]
    entered, go = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        go.wait(DEADLINE_S)

    served.server.do(hold)
    assert entered.wait(DEADLINE_S)
    if kind == "local":
        connection.send(specs)
    else:
        connection.send(specs[:1])
        remote = served.remote()
        for spec in specs:
            remote.channel.send(encode(spec))
    go.set()
    assert ended.wait(DEADLINE_S)
    assert waiting[0] < 200, "all requests were accepted before any update was handed out"
