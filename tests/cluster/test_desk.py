"""The thread that drives a fleet, between clients in this process and others at channels."""

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from shoal.cluster.desk import Answer, Desk
from shoal.cluster.fleet import About, Fleet
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


class Ready:
    """A channel on which there is always something."""

    backlog = False

    def __init__(self) -> None:
        self._fd = os.eventfd(1, os.EFD_CLOEXEC)

    def fileno(self) -> int:
        return self._fd


READY = Ready()


class Member(FakeReplica):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.said: list[SeqUpdate] = []

    @property
    def channel(self) -> Any:
        return READY

    def updates(self, timeout: float) -> list[SeqUpdate]:
        found = super().updates(timeout)
        self.said += found
        return found


class Setting:
    def __init__(self, unread_s: float = 60.0) -> None:
        self.replica = Member(0)
        self.fleet = Fleet(
            lambda number, generation: self.replica,
            lambda stats: ReplicaCapacity(100, 10**6, 4, 100),
            about=About("model", 1, 1),
            limits=FleetLimits(1000, None, None, 5, 60.0),
            local=[0],
        )
        self.desk = Desk(
            self.fleet, {"shout": bytes.upper, "fail": self._fail, "break": self._break}, unread_s=unread_s
        )

        self.channels: list[Channel] = []

    def local(self) -> "LocalClient":
        return LocalClient(self.desk)

    def remote(self) -> "RemoteClient":
        client = RemoteClient(self.desk)
        self.channels.append(client.channel)
        return client

    def _fail(self, payload: bytes) -> bytes:
        raise ConfigError("not like that")

    def _break(self, payload: bytes) -> bytes:
        raise KeyError("a bug")

    def now(self, what: Callable[[], Any]) -> Any:
        """On the desk's thread, what it gives."""
        found: queue.Queue[Any] = queue.Queue()
        self.desk.do(lambda: found.put(what()))
        return found.get(timeout=DEADLINE_S)

    def until(self, what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not self.now(what):
            assert time.monotonic() < deadline


@pytest.fixture
def setting(request: pytest.FixtureRequest) -> Iterator[Setting]:
    """`param`, if there is one, is `unread_s`."""
    found = Setting(getattr(request, "param", 60.0))
    yield found
    found.desk.close()
    for channel in found.channels:
        channel.close()


def opened(envelope: Updates) -> list[SeqUpdate]:
    """Updates with the client's own numbers."""
    return [replace_fields(update, seq=update.seq - envelope.base) for update in envelope.updates]


class LocalClient:
    def __init__(self, desk: Desk) -> None:
        self.got: queue.Queue[Answer] = queue.Queue()
        self.length: int | None = None
        self.line = desk.open(self._hear)
        self.outcomes = Outcomes()

    def _hear(self, answer: Answer) -> None:
        if isinstance(answer, ContextLength):
            self.length = answer.max_model_len
        else:
            self.got.put(answer)

    def add(self, *specs: EngineRequest) -> None:
        for spec in specs:
            self.outcomes.added(spec)
        self.line.send(specs)

    def next(self) -> list[SeqUpdate]:
        found = self.got.get(timeout=DEADLINE_S)
        assert isinstance(found, Updates)
        return opened(found)

    def finish(self) -> None:
        while self.outcomes.open:
            self.outcomes.take(self.next())


class RemoteClient(LocalClient):
    def __init__(self, desk: Desk) -> None:
        self.at_desk, ours = Channel.pair()
        self.channel = Channel(ours)
        self.outcomes = Outcomes()
        self.told: dict[int, ControlReply] = {}
        self.length = None
        desk.connect(self.at_desk)

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
                self.told[message.id] = message
            elif isinstance(message, ContextLength):
                self.length = message.max_model_len
            else:
                assert isinstance(message, Updates)
                found += opened(message)
        return found

    def hang_on(self) -> None:
        """
        Raises:
            ChannelClosed: the other end has gone.
        """
        while True:
            self.next()

    def ask(self, number: int, verb: str, payload: bytes = b"") -> ControlReply:
        self.send(ControlCall(number, verb, payload))
        while number not in self.told:
            assert not self.next()
        return self.told[number]


def test_each_client_gets_its_own(setting: Setting) -> None:
    """They all number their requests and groups from 0."""
    clients = [setting.local(), setting.remote(), setting.local()]
    clients.append(setting.remote())
    for number, client in enumerate(clients):
        client.add(*(request(seq, [number, seq], 5 + number, group=0) for seq in range(4)))
    for client in clients:
        client.finish()
        assert client.outcomes.tokens == {seq: alone(spec) for seq, spec in client.outcomes.specs.items()}
    assert len({spec.group for spec in setting.replica.added}) == 4
    setting.now(setting.fleet.audit)


def test_clients_are_told_how_long_requests_may_be(setting: Setting) -> None:
    """As soon as the fleet knows; one that comes later at once."""
    for client in (setting.local(), setting.remote(), setting.local()):
        client.add(request(0, [1], 5))
        client.finish()
        assert client.length == setting.now(lambda: setting.fleet.max_model_len)
        assert client.length is not None


def test_updates_are_handed_on_and_not_copied(setting: Setting) -> None:
    first, second = setting.local(), setting.local()
    for client in (first, second):
        client.line.send([request(3, [1], 5)])
    got: list[SeqUpdate] = []
    for client in (first, second):
        while not (got and got[-1].finish is not None):
            envelope = client.got.get(timeout=DEADLINE_S)
            assert isinstance(envelope, Updates)
            got += envelope.updates
            assert {update.seq - envelope.base for update in envelope.updates} == {3}
        setting.until(lambda: len(setting.replica.said) >= 10)
        assert all(any(update is said for said in setting.replica.said) for update in got)
        got.clear()


def test_an_abort_is_the_clients_own(setting: Setting) -> None:
    local, remote = setting.local(), setting.remote()
    local.add(request(0, [1], 200))
    remote.outcomes.may_abort.add(0)
    remote.add(request(0, [2], 250))
    remote.send(Abort((0, 7)))
    remote.finish()
    local.finish()
    assert local.outcomes.finished[0].finish is Finish.LENGTH


@pytest.mark.parametrize("garbage", [None, b"\xff\xff", encode(Stop()), encode(Abort((-1,)))])
def test_a_client_that_goes_or_talks_nonsense_frees_what_it_had(setting: Setting, garbage: bytes | None) -> None:
    gone, stays = setting.remote(), setting.remote()
    gone.send(*(request(seq, [seq], 10**7) for seq in range(5)))
    stays.add(request(0, [3], 20))
    setting.until(lambda: len(setting.replica.added) == 6)
    if garbage is None:
        gone.channel.close()
    else:
        gone.channel.send(garbage)
    setting.until(lambda: setting.fleet.num_unfinished <= 1)
    stays.finish()
    setting.until(lambda: not setting.replica.held)
    setting.now(setting.fleet.audit)
    if garbage is not None:
        with pytest.raises(ChannelClosed):
            gone.hang_on()


def test_a_line_that_is_closed_frees_what_it_had(setting: Setting) -> None:
    client = setting.local()
    client.line.send([request(0, [1], 10**7)])
    setting.until(lambda: bool(setting.replica.held))
    client.line.close()
    client.line.close()
    setting.until(lambda: not setting.replica.held)


def test_questions(setting: Setting) -> None:
    local, remote = setting.local(), setting.remote()
    assert local.line.ask("shout", b"abc").result(DEADLINE_S) == b"ABC"
    assert remote.ask(7, "shout", b"x") == ControlReply(7, b"X")
    status = fleet_status_decoder.decode(local.line.ask("status").result(DEADLINE_S))
    assert status.model == "model"
    with pytest.raises(UserError, match="not like that"):
        local.line.ask("fail").result(DEADLINE_S)
    with pytest.raises(EngineError, match="break could not be answered: KeyError: 'a bug'"):
        local.line.ask("break").result(DEADLINE_S)
    with pytest.raises(EngineError, match="nobody knows 'sing' here"):
        local.line.ask("sing").result(DEADLINE_S)
    for payload in (b"many", b"", b"-1"):
        with pytest.raises(UserError, match="a number of replicas"):
            local.line.ask("scale", payload).result(DEADLINE_S)
    assert remote.ask(8, "fail").user_error
    assert not remote.ask(9, "break").user_error
    assert local.line.ask("drain").result(DEADLINE_S) == b"0"
    local.line.send([request(0, [1])])
    assert local.next()[0].refusal is RefusalKind.CLOSING


def test_a_number_that_is_used_twice_ends_the_second_and_not_the_first(setting: Setting) -> None:
    client = setting.local()
    client.line.send([request(0, [1], 10**7), request(0, [2])])
    while not (refused := [update for update in client.next() if update.error]):
        pass
    assert refused[0].refusal is RefusalKind.INVALID
    client.line.close()
    setting.until(lambda: not setting.replica.held)


def test_a_request_with_which_nothing_can_be_done_ends_alone(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    client = setting.local()
    add = setting.fleet.add

    def choosy(spec: EngineRequest) -> None:
        if len(spec.tokens) > 4:
            raise OverflowError("too large a number")
        add(spec)

    monkeypatch.setattr(setting.fleet, "add", choosy)
    client.line.send([request(0, [1, 2]), request(1, [1])])
    (refused,) = client.next()
    assert (refused.seq, refused.refusal) == (0, RefusalKind.FAILED)
    assert "could not be taken: OverflowError" in refused.error
    while not any(update.finish is Finish.LENGTH for update in client.next()):
        pass
    setting.now(setting.fleet.audit)


@pytest.mark.parametrize("busy", [False, True])
def test_an_api_server_that_goes_is_a_warning_if_it_had_requests(
    setting: Setting, caplog: pytest.LogCaptureFixture, busy: bool
) -> None:
    remote = setting.remote()
    if busy:
        remote.send(request(0, [1], 10**7))
        setting.until(lambda: bool(setting.replica.held))
    setting.until(lambda: bool(setting.desk.num_clients))
    remote.channel.close()
    setting.until(lambda: not setting.desk.num_clients)
    said = [each for each in caplog.records if "an API server has gone" in each.message]
    assert [each.levelname for each in said] == (["WARNING"] if busy else [])


def test_a_question_that_nobody_waits_for_any_more(setting: Setting) -> None:
    client = setting.local()
    held = threading.Event()
    setting.desk.do(lambda: held.wait(DEADLINE_S))
    future = client.line.ask("status")
    assert future.cancel()
    held.set()
    assert client.line.ask("shout", b"a").result(DEADLINE_S) == b"A"


def test_when_the_thread_fails_everyone_is_told(setting: Setting, caplog: pytest.LogCaptureFixture) -> None:
    local, remote = setting.local(), setting.remote()
    local.line.send([request(0, [1], 10**7)])
    remote.send(request(0, [2], 10**7))
    setting.until(lambda: len(setting.replica.held) == 2)
    held = threading.Event()
    setting.desk.do(lambda: held.wait(DEADLINE_S))
    setting.desk.do(lambda: dict[str, str]()["a bug"])
    late = local.line.ask("status")
    local.line.send([request(1, [1])])
    held.set()
    with pytest.raises(EngineError, match="the engine's thread has failed: KeyError"):
        late.result(DEADLINE_S)
    ends: dict[int, SeqUpdate] = {}
    while len(ends) < 2:
        ends |= {update.seq: update for update in local.next() if update.finish is not None}
    while not (theirs := [update for update in remote.next() if update.finish is not None]):
        pass
    for update in (*ends.values(), *theirs):
        assert update.refusal is RefusalKind.LOST
        assert "the engine's thread has failed: KeyError: 'a bug'" in update.error
    with pytest.raises(ClosedError, match="has failed: KeyError"):
        local.line.send([request(2, [1])])
    with pytest.raises(ClosedError):
        local.line.ask("status").result(DEADLINE_S)
    with pytest.raises(ChannelClosed):
        remote.hang_on()
    setting.desk.close()
    assert setting.replica.closed


def test_when_it_is_closed_everyone_is_told(setting: Setting) -> None:
    local, remote = setting.local(), setting.remote()
    local.line.send([request(0, [1], 10**7)])
    remote.send(request(0, [2], 10**7))
    setting.until(lambda: len(setting.replica.held) == 2)
    setting.desk.close()
    setting.desk.close()
    for client in (local, remote):
        while not (ends := [update for update in client.next() if update.finish is not None]):
            pass
        assert [(update.seq, update.refusal, update.error) for update in ends] == [
            (0, RefusalKind.CLOSING, "the engine was closed")
        ]
    with pytest.raises(ClosedError, match="was closed"):
        local.line.send([])
    local.line.close()


def fill(channel: Channel) -> None:
    """Nothing more goes out until somebody reads."""
    while not channel.backlog:
        channel.send(encode(ControlReply(10**6, bytes(1 << 16))))


def test_one_that_does_not_read_for_a_while_misses_nothing_and_keeps_nobody_waiting(setting: Setting) -> None:
    remote, local = setting.remote(), setting.local()
    setting.now(lambda: fill(remote.at_desk))
    remote.add(*(request(seq, [seq], 60) for seq in range(10)))
    local.add(*(request(seq, [seq], 90) for seq in range(10)))
    local.finish()
    setting.until(lambda: not setting.replica.held)
    remote.finish()
    setting.now(setting.fleet.audit)


@pytest.mark.parametrize("setting", [0.05], indirect=True)
def test_one_that_does_not_read_at_all_is_given_up(setting: Setting) -> None:
    remote = setting.remote()
    setting.now(lambda: fill(remote.at_desk))
    remote.send(request(0, [1], 10**7))
    setting.until(lambda: bool(setting.replica.added))
    setting.until(lambda: not setting.replica.held)
    setting.until(lambda: not setting.desk.num_clients)


def test_a_channel_that_somebody_else_closes(setting: Setting) -> None:
    """Whoever started an API server ends it, and its channel, at any time."""
    remote, local = setting.remote(), setting.local()
    remote.send(request(0, [1], 10**7))
    setting.until(lambda: bool(setting.replica.held))
    remote.at_desk.close()
    setting.until(lambda: not setting.replica.held)
    local.add(request(0, [1]))
    local.finish()


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_many_requests_at_once_leave_others_their_turns(setting: Setting, kind: str) -> None:
    """They are taken some at a time, and what replicas say is handed out in between."""
    waiting: list[int] = []
    ended = threading.Event()

    def deliver(answer: Answer) -> None:
        if isinstance(answer, ContextLength):
            return
        assert isinstance(answer, Updates)
        waiting.append(setting.fleet.num_unfinished)
        if any(update.finish is not None for update in answer.updates):
            ended.set()

    line = setting.desk.open(deliver)
    specs = [request(seq, [seq + 1], 1) for seq in range(1000)]
    entered, go = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        go.wait(DEADLINE_S)

    setting.desk.do(hold)
    assert entered.wait(DEADLINE_S)
    if kind == "local":
        line.send(specs)
    else:
        line.send(specs[:1])
        remote = setting.remote()
        for spec in specs:
            remote.channel.send(encode(spec))
    go.set()
    assert ended.wait(DEADLINE_S)
    assert waiting[0] < 200, "all were taken before anything was handed out"
