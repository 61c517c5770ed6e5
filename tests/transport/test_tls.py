"""Tests of channels over TLS, and of the files that they need."""

import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import ConfigError
from shoal.transport import tls
from shoal.transport.channel import Channel, ChannelClosed, wait
from shoal.wire.credentials import TlsFiles
from support.certificates import Cluster
from support.fakes import steady

BIG = 3_000_000


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    return Cluster(tmp_path_factory.mktemp("cluster")).host()


@contextmanager
def connected(files: TlsFiles, theirs: TlsFiles | None = None) -> Iterator[tuple[Channel, Channel]]:
    """Yield the ends of a connection, after their handshake: that of the server first."""
    one, two = socket.socketpair()
    with closing(Channel(tls.server_socket(one, files))) as server:
        connection = tls.client_socket(two, theirs or files)
        with closing(Channel(connection)) as client:
            shake_hands(server, connection)
            yield server, client


def shake_hands(server: Channel, client: tls.TlsSocket) -> None:
    while not client.shake_hands():
        assert server.receive() == []
    assert server.receive() == []


def receive_all(channel: Channel, count: int) -> list[bytes]:
    frames, deadline = list[bytes](), time.monotonic() + 30
    while len(frames) < count:
        assert time.monotonic() < deadline, "nothing arrives"
        if wait([channel], 30):  # it also returns when bytes were written
            frames += channel.receive()
    return frames


@settings(steady, max_examples=60)
@given(messages=st.lists(st.tuples(st.booleans(), st.integers(0, 300) | st.integers(0, 300_000))))
def test_frames_arrive_as_sent_in_both_directions(files: TlsFiles, messages: list[tuple[bool, int]]) -> None:
    """`messages` has the sender and the length of each."""
    frames = [(up, os.urandom(length)) for up, length in messages]
    with connected(files) as ends:
        for up, frame in frames:
            ends[up].send(frame)
        expected = [[frame for up, frame in frames if up is not receiver] for receiver in (False, True)]
        received: tuple[list[bytes], list[bytes]] = ([], [])
        deadline = time.monotonic() + 30
        while any(len(got) < len(wanted) for got, wanted in zip(received, expected, strict=True)):
            assert time.monotonic() < deadline, "nothing arrives"
            readable = wait(ends, 30)  # it also returns when bytes were written
            for number, end in enumerate(ends):
                received[number].extend(end.receive() if end in readable else ())
        assert list(received) == expected
        assert wait(ends, 0) == []


@settings(steady, max_examples=60)
@given(
    frames=st.lists(st.binary(max_size=40_000) | st.just(b""), max_size=5),
    cuts=st.lists(st.integers(1, 20_000), min_size=1),
)
def test_frames_are_received_for_any_split_of_the_encrypted_bytes(
    files: TlsFiles, frames: list[bytes], cuts: list[int]
) -> None:
    """A relay between both sides hands the bytes on in parts of any size. After each, `wait` sees what can be read."""
    near, far = socket.socketpair()
    relay_near, relay_far = socket.socketpair()
    connection = tls.client_socket(near, files)
    server, client = Channel(tls.server_socket(relay_far, files)), Channel(connection)
    received = list[bytes]()
    with closing(server), closing(client), far, relay_near:
        for sock in (far, relay_near):
            sock.setblocking(False)
        turn, sent, ready = 0, False, False
        while not sent or len(received) < len(frames) or client.backlog:
            moved = False
            for source, target in ((far, relay_near), (relay_near, far)):
                try:
                    data = source.recv(cuts[turn % len(cuts)])
                except BlockingIOError:
                    continue
                turn, moved = turn + 1, True
                target.sendall(data)
            if server in wait([server], 0):
                received += server.receive()
            ready = ready or connection.shake_hands()
            if ready and not sent:
                sent = True
                for frame in frames:
                    client.send(frame)
            if sent:
                client.flush(0)
            assert received == frames[: len(received)]
            assert moved or not sent or client.backlog or len(received) == len(frames), "it stands still"
        assert received == frames


def test_big_frames_cross_in_both_directions_at_the_same_time(files: TlsFiles) -> None:
    """Each side has a thread that sends and one that receives."""
    with connected(files) as ends:
        frames = [[os.urandom(BIG), b"", os.urandom(BIG + number)] for number in range(2)]
        received: list[list[bytes]] = [[], []]

        def send(number: int) -> None:
            for frame in frames[number]:
                ends[number].send(frame)
                assert ends[number].flush(60)

        def receive(number: int) -> None:
            received[number] = receive_all(ends[number], 3)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(2) for work in (send, receive)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert received == frames[::-1]


def test_waiting_does_not_spin_while_the_other_side_is_silent(files: TlsFiles) -> None:
    with connected(files) as (server, client):
        client.send(b"x")
        assert receive_all(server, 1) == [b"x"]
        assert wait([server, client], 0.05) == []
        assert not server.backlog


def test_a_limited_number_of_frames_is_taken_and_the_rest_is_known(files: TlsFiles) -> None:
    with connected(files) as (server, client):
        for frame in (b"1", b"2", b"3"):
            client.send(frame)
        assert wait([server], 30)
        assert server.receive(1) == [b"1"]
        assert server.has_frame
        assert server.receive(1) == [b"2"]
        assert server.receive() == [b"3"]
        assert not server.has_frame


def test_frames_are_returned_before_the_end_is_reported(files: TlsFiles) -> None:
    with connected(files) as (server, client):
        client.send(b"last words")
        client.close()
        assert receive_all(server, 1) == [b"last words"]
        for _ in range(2):
            with pytest.raises(ChannelClosed):
                server.receive()


@pytest.mark.parametrize("length", [3, 100, 40_000])
def test_a_connection_that_ends_in_the_middle_of_a_record_or_frame(files: TlsFiles, length: int) -> None:
    near, far = socket.socketpair()
    relay_near, relay_far = socket.socketpair()
    connection = tls.client_socket(near, files)
    with closing(Channel(tls.server_socket(relay_far, files))) as server, closing(Channel(connection)) as client:
        for sock in (far, relay_near):
            sock.setblocking(False)

        def pass_on(most: int = 1 << 20) -> None:
            for source, target in ((far, relay_near), (relay_near, far)):
                with suppress(BlockingIOError):
                    target.sendall(source.recv(most))

        while not connection.shake_hands():
            pass_on()
            server.receive()
        pass_on()
        assert server.receive() == []
        client.send(bytes(100_000))
        pass_on(length)
        relay_near.close()
        far.close()
        while wait([server], 0):
            try:
                assert server.receive() == []
            except ChannelClosed:
                return
        raise AssertionError("the end is not noticed")


def test_a_changed_byte_ends_the_connection(files: TlsFiles) -> None:
    one, two = socket.socketpair()
    tap, three = socket.socketpair()
    connection = tls.client_socket(two, files)
    with closing(Channel(tls.server_socket(three, files))) as server, closing(Channel(connection)) as client, tap, one:
        one.setblocking(False)
        tap.setblocking(False)
        done = False
        while not done or wait([server], 0):
            done = connection.shake_hands()
            for source, target in ((one, tap), (tap, one)):
                with suppress(BlockingIOError):
                    target.sendall(source.recv(1 << 20))
            server.receive()
        client.send(b"a message")
        data = bytearray(one.recv(1 << 20))
        data[-1] ^= 1
        tap.sendall(data)
        with pytest.raises(ChannelClosed, match=r"(?i)bad.record.mac") as caught:
            server.receive()
        assert isinstance(caught.value.__cause__, ssl.SSLError)


def test_shutting_down_ends_the_connection_and_sends_nothing_in_the_clear(files: TlsFiles) -> None:
    with connected(files) as (server, client):
        client.shut_down()
        with pytest.raises(ChannelClosed):
            client.receive()
        with pytest.raises(ChannelClosed):
            client.send(b"in the clear")
        with pytest.raises(ChannelClosed):
            server.receive()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the program openssl")
@pytest.mark.slow
def test_new_keys_of_the_other_side_are_taken(files: TlsFiles) -> None:
    """OpenSSL's client sends a KeyUpdate for each line that is a K, and asks for one of this side."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        where = f"127.0.0.1:{listener.getsockname()[1]}"
        client = subprocess.Popen(
            ["openssl", "s_client", "-connect", where, "-cert", files.certificate, "-key", files.key]
            + ["-CAfile", files.ca],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert client.stdin is not None
        assert client.stdout is not None
        with client, closing(Channel(tls.server_socket(listener.accept()[0], files))) as server:
            for number in range(3):
                frame = f"frame {number}\n".encode()
                client.stdin.write(len(frame).to_bytes(4, "little") + frame)
                client.stdin.flush()
                assert receive_all(server, 1) == [frame]
                client.stdin.write(b"K\n")
                client.stdin.flush()
                assert wait([server], 30)
                assert server.receive() == []
                answer = b"answer %d\n" % number
                server.send(answer)
                while answer not in (line := client.stdout.readline()):
                    assert line, "the client has ended"
            client.kill()


# --- the files ---------------------------------------------------------------------------------------------------


def test_good_files_are_accepted_with_their_date(tmp_path: Path) -> None:
    assert 19 < tls.check_files(Cluster(tmp_path).host(days=20)).days_left < 20


def test_files_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    ours, theirs = Cluster(tmp_path / "ours"), Cluster(tmp_path / "theirs")
    good, other, foreign = ours.host("good"), ours.host("other"), theirs.host("foreign")
    past, future = datetime.now(UTC) - timedelta(days=9), datetime.now(UTC) + timedelta(days=9)
    open_key = ours.host("open")
    os.chmod(open_key.key, 0o640)
    empty = tmp_path / "empty.pem"
    empty.touch(0o600)
    bad = {
        r"good/gone.pem can't be read \(No such file or directory\)": TlsFiles(
            good.ca, str(Path(good.key).with_name("gone.pem")), good.key
        ),
        r"open/key.pem may be read by users other than its owner \(mode 640\): chmod 600 it": open_key,
        r"old/cert.pem or its CA has expired: make new ones with `shoal cluster-keys`": ours.host("old", 1, past),
        r"new/cert.pem or its CA is not valid yet: check the clock": ours.host("new", 1, future),
        r"good/cert.pem can't be used with the CA in .*foreign/ca.pem": TlsFiles(
            foreign.ca, good.certificate, good.key
        ),
        r"good/cert.pem and .*other/key.pem can't be used .*\(key values mismatch\)": TlsFiles(
            good.ca, good.certificate, other.key
        ),
        r"empty.pem .*all must be PEM files": TlsFiles(good.ca, str(empty), good.key),
        r"empty.pem \(.*all must be PEM files": TlsFiles(str(empty), good.certificate, good.key),
    }
    for message, files in bad.items():
        with pytest.raises(ConfigError, match=message):
            tls.check_files(files)
