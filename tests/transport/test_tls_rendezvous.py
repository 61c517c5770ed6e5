"""Tests of a rendezvous with TLS: who gets in, who is refused and told why, and who cannot disturb the others."""

import logging
import os
import socket
import ssl
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from shoal.addresses import Address
from shoal.errors import ConfigError
from shoal.transport.channel import Channel, wait
from shoal.transport.connecting import connect, report_failure
from shoal.transport.rendezvous import Rendezvous
from shoal.transport.room_member import RoomMember
from shoal.wire.base import encode
from shoal.wire.credentials import Credentials, TlsFiles
from shoal.wire.rendezvous import Hello, JoinRefused, StoreGet, StoreSet, StoreValue, from_rendezvous
from support.certificates import Cluster, files_in

KEY = "a key"
PAST = datetime.now(UTC) - timedelta(days=9)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    return Cluster(tmp_path_factory.mktemp("cluster"))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    return Cluster(tmp_path_factory.mktemp("foreign"))


@pytest.fixture(scope="module")
def ours(cluster: Cluster) -> Credentials:
    return Credentials(KEY, cluster.host())


@pytest.fixture(scope="module")
def another_host(cluster: Cluster) -> Credentials:
    return Credentials(KEY, cluster.host("another"))


@pytest.fixture
def meeting(ours: Credentials) -> Iterator[Rendezvous]:
    with Rendezvous(credentials=ours) as found:
        yield found


def ask(meeting: Rendezvous, credentials: Credentials) -> None:
    """Connect to a rendezvous, and use its store."""
    with closing(connect(Address.parse(meeting.address), credentials, timeout=30)) as channel:
        for question in (StoreSet("a", bytes(100_000)), StoreGet(("a",), wait=True)):
            channel.send(encode(question))
            answers = list[bytes]()
            while not answers:
                assert wait([channel], 30)
                answers = channel.receive()
            assert from_rendezvous.decode(answers[0]) == StoreValue(bytes(100_000))


def test_members_of_a_room_exchange_messages(meeting: Rendezvous, ours: Credentials, another_host: Credentials) -> None:
    def run(rank: int, credentials: Credentials) -> list[bytes] | None:
        address = Address.parse(meeting.address)
        member = RoomMember(address, credentials, room="room", rank=rank, size=2, timeout=30)
        with closing(member):
            return member.collect("results", bytes([rank]) * 3_000_000, timeout=30)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(run, range(2), [ours, another_host]))
    assert found == [[bytes([rank]) * 3_000_000 for rank in range(2)], None]


def test_clients_that_send_nothing_or_rubbish_do_not_disturb_others(ours: Credentials) -> None:
    with Rendezvous(credentials=ours, hello_s=0.5) as meeting:
        address = Address.parse(meeting.address)
        hello = ssl.MemoryBIO()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        with suppress(ssl.SSLWantReadError):
            context.wrap_bio(ssl.MemoryBIO(), hello).do_handshake()
        whole = hello.read()
        starts = [
            b"",
            whole[:1],
            whole[:50],
            whole,
            b"\x16\x03" + os.urandom(500),
            os.urandom(500),
            b"GET / HTTP/1.1\r\n",
        ]
        strangers = [socket.create_connection((address.host, address.port), timeout=30) for _ in starts]
        for stranger, start in zip(strangers, starts, strict=True):
            stranger.sendall(start)
        ask(meeting, ours)
        for stranger in strangers:
            with stranger, suppress(ConnectionError):
                while stranger.recv(4096):  # it is closed after `hello_s` at the latest
                    pass
        ask(meeting, ours)


def test_open_handshakes_do_not_keep_others_out(ours: Credentials) -> None:
    with Rendezvous(credentials=ours, max_unauthenticated=4, hello_s=600.0) as meeting:
        address = Address.parse(meeting.address)
        strangers = [socket.create_connection((address.host, address.port), timeout=30) for _ in range(8)]
        ask(meeting, ours)
        for stranger in strangers:
            stranger.close()


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "shoal")
    return caplog


def warnings_of(logged: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in logged.records if record.levelno == logging.WARNING)


def refused(meeting: Rendezvous, credentials: Credentials) -> str:
    """Return the error of a process that cannot join."""
    with pytest.raises(ConfigError) as caught:
        connect(Address.parse(meeting.address), credentials, timeout=30)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_process_without_tls_is_told(
    meeting: Rendezvous, ours: Credentials, logged: pytest.LogCaptureFixture
) -> None:
    assert f"{meeting.address}: it uses TLS: give --cluster-tls" in refused(meeting, Credentials(KEY))
    ask(meeting, ours)
    assert f"a process at 127.0.0.1 cannot join at {meeting.address}: it does not use TLS" in warnings_of(logged)


def test_a_process_with_tls_is_told_that_the_rendezvous_has_none(
    ours: Credentials, logged: pytest.LogCaptureFixture
) -> None:
    with Rendezvous(credentials=Credentials(KEY)) as meeting:
        assert f"{meeting.address} does not use TLS: give --cluster-tls" in refused(meeting, ours)
        ask(meeting, Credentials(KEY))
    assert f"a process at 127.0.0.1 cannot join at {meeting.address}: it uses TLS" in warnings_of(logged)


def test_certificates_of_another_cluster(
    meeting: Rendezvous, ours: Credentials, foreign: Cluster, logged: pytest.LogCaptureFixture
) -> None:
    theirs = Credentials(KEY, foreign.host("theirs"))
    assert f"{meeting.address} can't be joined: its certificate has another CA" in refused(meeting, theirs)
    ask(meeting, ours)
    assert "it does not accept the certificate of this host, which has another CA" in warnings_of(logged)


def test_a_process_whose_certificate_has_another_ca_than_it_trusts(
    meeting: Rendezvous, ours: Credentials, foreign: Cluster, logged: pytest.LogCaptureFixture
) -> None:
    """It learns of it only after its own side of the handshake is complete."""
    assert ours.tls is not None
    mixed = foreign.host("mixed")
    theirs = Credentials(KEY, TlsFiles(ours.tls.ca, mixed.certificate, mixed.key))
    for _ in range(30):
        assert "can't be joined: it does not accept the certificate of this host" in refused(meeting, theirs)
    ask(meeting, ours)
    found = warnings_of(logged)
    assert "its certificate has another CA" in found
    assert found.count("its certificate has another CA") == 1, "a repeated mistake does not fill the log"


def test_certificates_that_have_expired(
    meeting: Rendezvous, ours: Credentials, cluster: Cluster, logged: pytest.LogCaptureFixture
) -> None:
    old = Credentials(KEY, cluster.host("old", 1, PAST))
    assert "it does not accept the certificate of this host, which has expired" in refused(meeting, old)
    ask(meeting, ours)
    assert "its certificate has expired: make new ones" in warnings_of(logged)
    with Rendezvous(credentials=old) as late:
        assert "its certificate has expired: make new ones" in refused(late, ours)


def test_a_process_without_a_certificate(
    meeting: Rendezvous, ours: Credentials, logged: pytest.LogCaptureFixture
) -> None:
    address = Address.parse(meeting.address)
    assert ours.tls is not None
    context = ssl.create_default_context(cafile=ours.tls.ca)
    context.check_hostname = False
    with (
        socket.create_connection((address.host, address.port), timeout=30) as raw,
        context.wrap_socket(raw) as stranger,
        pytest.raises(ssl.SSLError, match=r"(?i)certificate.required"),
    ):
        stranger.recv(1)
    ask(meeting, ours)
    assert "cannot join" in warnings_of(logged)
    assert "it has no certificate" in warnings_of(logged)


class Door:
    """A door that nobody may enter. It has the reports of those who cannot join."""

    def __init__(self) -> None:
        self.reports: list[str] = []

    def objection(self, hello: Hello) -> JoinRefused:
        self.reports.append(hello.failure)
        return JoinRefused("closed")

    def enter(self, hello: Hello, channel: Channel) -> None:
        raise AssertionError


@pytest.mark.parametrize(
    ("there", "here", "told"),
    [
        ("ours", "another", "no model"),
        ("ours", "foreign", "its certificate has another CA"),
        ("ours", "none", "no model"),
        ("none", "ours", "does not use TLS"),
    ],
)
def test_a_process_that_knows_the_key_reports_why_it_cannot_join(
    ours: Credentials, another_host: Credentials, foreign: Cluster, there: str, here: str, told: str
) -> None:
    """If both sides do not agree on TLS, the rendezvous learns this: otherwise it would wait for the process."""
    foreign_host = Credentials(KEY, foreign.host(f"{here} at {there}"))
    known = {"ours": ours, "another": another_host, "foreign": foreign_host, "none": Credentials(KEY)}
    door = Door()
    with Rendezvous(credentials=known[there], doors={"door": door}) as meeting:
        address = Address.parse(meeting.address)
        stranger = Credentials("another key", known[here].tls)
        asked: dict[str, Any] = {"room": "door", "rank": 1, "size": 2, "why": "no model", "timeout": 30}
        report_failure(address, stranger, **asked)
        assert door.reports == []
        assert report_failure(address, known[here], **asked)
    (found,) = door.reports
    assert told in found


def test_the_shared_key_is_needed_too(meeting: Rendezvous, ours: Credentials) -> None:
    assert "the shared key differs" in refused(meeting, Credentials("another", ours.tls))


def test_renewed_files_are_used_for_new_connections(cluster: Cluster, ours: Credentials) -> None:
    folder, valid = cluster.folder("renewed", 1, PAST), cluster.folder("valid")
    with Rendezvous(credentials=Credentials(KEY, files_in(folder))) as meeting:
        assert "has expired" in refused(meeting, ours)
        for name in ("cert.pem", "key.pem"):
            os.replace(valid / name, folder / name)
        ask(meeting, ours)
