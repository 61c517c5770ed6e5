"""Tests of channels: frames over a socket pair."""

import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.transport.channel import Channel, ChannelClosed, wait
from support.descriptors import many_open_files
from support.fakes import steady

BIG = 5_000_000


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    ours, theirs = Channel.pair()
    other = Channel(theirs)
    yield ours, other
    ours.close()
    other.close()


def receive_all(channel: Channel, count: int) -> list[bytes]:
    frames = list[bytes]()
    while len(frames) < count:
        assert wait([channel], 10), "nothing arrives"
        frames += channel.receive()
    return frames


@settings(steady, max_examples=60)
@given(frames=st.lists(st.binary(max_size=300), max_size=8), cuts=st.lists(st.integers(1, 100), min_size=1))
def test_frames_are_received_as_sent_for_any_split_of_the_bytes(frames: list[bytes], cuts: list[int]) -> None:
    raw, theirs = socket.socketpair()
    channel = Channel(theirs)
    with raw:
        data = b"".join(struct.pack("<I", len(frame)) + frame for frame in frames)
        received, start, turn = list[bytes](), 0, 0
        while start < len(data):
            stop = start + cuts[turn % len(cuts)]
            raw.sendall(data[start:stop])
            whole = received + channel.receive()
            assert whole == frames[: len(whole)]
            received, start, turn = whole, stop, turn + 1
        assert received == frames
        assert channel.receive() == []
    channel.close()


def test_sending_does_not_block_without_a_reader(ends: tuple[Channel, Channel]) -> None:
    ours, other = ends
    frames = [os.urandom(BIG), b"", b"small", os.urandom(BIG)]
    for frame in frames:
        ours.send(frame)
    assert ours.backlog
    assert not ours.flush(0)
    reader = threading.Thread(target=lambda: received.extend(receive_all(other, len(frames))))
    received = list[bytes]()
    reader.start()
    assert ours.flush(30)
    assert not ours.backlog
    reader.join(30)
    assert received == frames


def test_waiting_writes_the_remaining_bytes(ends: tuple[Channel, Channel]) -> None:
    ours, other = ends
    ours.send(bytes(BIG))
    other.send(b"hello")
    received = list[bytes]()
    while not received:
        assert wait([ours], 0) == [ours], "bytes to write do not hide bytes to read"
        received += other.receive()
    assert received == [bytes(BIG)]
    assert ours.receive() == [b"hello"]
    assert not ours.backlog


def test_waiting_returns_the_readable_channels() -> None:
    pairs = [Channel.pair() for _ in range(3)]
    others = [Channel(theirs) for _, theirs in pairs]
    channels = [ours for ours, _ in pairs]
    assert wait(channels, 0) == []
    others[1].send(b"x")
    assert wait(channels, 5) == [channels[1]]
    others[2].close()
    assert set(wait(channels, 5)) == {channels[1], channels[2]}
    for channel in channels + others:
        channel.close()


def test_frames_are_returned_before_the_end_is_reported(ends: tuple[Channel, Channel]) -> None:
    ours, other = ends
    other.send(b"last words")
    other.close()
    assert ours.receive() == [b"last words"]
    with pytest.raises(ChannelClosed):
        ours.receive()
    with pytest.raises(ChannelClosed):
        ours.receive()


def test_an_incomplete_frame_before_the_end_is_dropped(ends: tuple[Channel, Channel]) -> None:
    ours, other = ends
    os.write(other.fileno(), struct.pack("<I", 100) + b"half")
    assert ours.receive() == []
    other.close()
    with pytest.raises(ChannelClosed):
        ours.receive()


def test_has_frame_is_true_for_complete_frames_only(ends: tuple[Channel, Channel]) -> None:
    ours, other = ends
    for part in (b"\3", b"\0\0\0", b"ab"):
        os.write(other.fileno(), part)
        assert ours.receive() == []
        assert not ours.has_frame
    os.write(other.fileno(), b"c" + struct.pack("<I", 1) + b"d")
    assert ours.receive(1) == [b"abc"]
    assert ours.has_frame
    assert ours.receive(1) == [b"d"]
    assert not ours.has_frame
    os.write(other.fileno(), struct.pack("<I", 0) + struct.pack("<I", 1000))
    assert ours.receive(1) == [b""]
    ours.max_frame_bytes = 999
    assert ours.has_frame, "`receive` would raise an error"
    with pytest.raises(ChannelClosed, match="a frame of 1000 bytes"):
        ours.receive(1)


def test_a_process_may_have_many_files_open() -> None:
    with many_open_files():
        high, theirs = Channel.pair()
    other = Channel(theirs)
    high.send(bytes(BIG))
    assert high.backlog
    assert not high.flush(0.01)
    received = list[bytes]()
    reader = threading.Thread(target=lambda: received.extend(receive_all(other, 1)))
    reader.start()
    assert high.flush(60)
    reader.join(60)
    assert received == [bytes(BIG)]
    high.close()
    other.close()


def test_shutting_down_wakes_a_waiting_thread(ends: tuple[Channel, Channel]) -> None:
    ours, _ = ends
    found = list[list[Channel]]()
    waiter = threading.Thread(target=lambda: found.append(wait([ours], 60)))
    waiter.start()
    ours.shut_down()
    waiter.join(60)
    assert found == [[ours]]
    with pytest.raises(ChannelClosed):
        ours.receive()
    ours.close()
    ours.shut_down()


def test_sending_to_a_closed_channel_is_an_error(ends: tuple[Channel, Channel]) -> None:
    ours, other = ends
    other.close()
    with pytest.raises(ChannelClosed):
        ours.send(b"x")
    with pytest.raises(ChannelClosed):
        ours.flush(1)


def test_unsent_bytes_do_not_hide_the_last_frames_received(ends: tuple[Channel, Channel]) -> None:
    ours, other = ends
    ours.send(bytes(5_000_000))
    assert ours.backlog
    other.send(b"last words")
    other.close()
    assert wait([ours], 1) == [ours]
    assert ours.receive() == [b"last words"]
    with pytest.raises(ChannelClosed):
        ours.receive()


def test_using_a_closed_channel_is_an_error(ends: tuple[Channel, Channel]) -> None:
    ours, _ = ends
    ours.close()
    with pytest.raises(ChannelClosed):
        ours.send(b"x")
    with pytest.raises(ChannelClosed):
        ours.receive()


def test_a_channel_can_be_made_from_a_descriptor() -> None:
    ours, theirs = Channel.pair()
    other = Channel.from_fd(theirs.detach())
    other.send(b"child")
    assert ours.receive() == [b"child"]
    ours.close()
    other.close()


def test_frames_of_several_threads_stay_whole(ends: tuple[Channel, Channel]) -> None:
    ours, other = ends
    senders, each = 4, 100

    def send(sender: int) -> None:
        for i in range(each):
            ours.send(struct.pack("<II", sender, i) + bytes([sender]) * (i * 50))

    threads = [threading.Thread(target=send, args=(sender,)) for sender in range(senders)]

    def flush() -> None:
        ours.flush(30)  # while others send
        for thread in threads:
            thread.join()
        ours.flush(30)

    flusher = threading.Thread(target=flush)
    for thread in [*threads, flusher]:
        thread.start()
    frames = receive_all(other, senders * each)
    flusher.join(30)
    for sender in range(senders):
        mine = [frame for frame in frames if struct.unpack_from("<I", frame)[0] == sender]
        assert mine == [struct.pack("<II", sender, i) + bytes([sender]) * (i * 50) for i in range(each)]


def test_a_channel_that_was_closed_here_is_not_waited_for(ends: tuple[Channel, Channel]) -> None:
    ours, other = ends
    closed, theirs = Channel.pair()
    closed.close()
    theirs.close()
    assert wait([ours, closed], 10) == [closed]
    other.send(b"a")
    assert wait([closed, ours], 10) == [closed, ours]


FORK = """
import os, socket
from shoal.transport.channel import Channel, ChannelClosed, wait
from shoal.transport.rendezvous import Rendezvous
from shoal.wire.credentials import Credentials

ours, theirs = Channel.pair()
other = Channel(theirs)
inbox, outbox = os.pipe()
with Rendezvous(credentials=Credentials("key")) as meeting:
    port = int(meeting.address.rpartition(":")[2])
    pid = os.fork()
    if pid == 0:
        os.close(outbox)
        try:
            ours.send(b"stop")
        except ChannelClosed:
            os.read(inbox, 1)  # run as long as the parent
            os._exit(3)
        os._exit(1)
ours.close()
assert wait([other], 30)
try:
    print(other.receive())
except ChannelClosed:
    print("the end is seen")
socket.create_server(("127.0.0.1", port)).close()  # the port is free
os.close(outbox)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.slow
def test_a_forked_child_does_not_use_the_parents_connections() -> None:
    """It cannot send on them, and does not keep connections or ports open."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stdout.split("\n") == ["the end is seen", "3", ""], done.stderr
