"""Tests of a connection that a relay's thread reads."""

import socket
from collections.abc import Iterator

import pytest

from shoal.transport.channel import Channel, ChannelClosed, wait
from shoal.transport.relay import Relay

MANY = 64
FRAME = bytes(1 << 20)


@pytest.fixture
def ends() -> Iterator[tuple[Relay, Channel]]:
    ours, theirs = socket.socketpair()
    relay, far = Relay(Channel(ours)), Channel(theirs)
    yield relay, far
    relay.close()
    far.close()


def receive(channel: Channel, count: int) -> list[bytes]:
    found: list[bytes] = []
    while len(found) < count:
        assert wait([channel], 60)
        found += channel.receive()
    return found


def test_frames_go_both_ways_in_order(ends: tuple[Relay, Channel]) -> None:
    relay, far = ends
    frames = [bytes([i]) * i for i in range(200)]
    for sender, receiver in ((relay.channel, far), (far, relay.channel)):
        for frame in frames:
            sender.send(frame)
        assert receive(receiver, len(frames)) == frames


def test_a_relay_reads_frames_that_nobody_receives_yet(ends: tuple[Relay, Channel]) -> None:
    relay, far = ends
    for _ in range(MANY):
        far.send(FRAME)
    assert far.flush(60)
    assert receive(relay.channel, MANY) == [FRAME] * MANY


def test_a_closed_relay_sends_its_last_frames(ends: tuple[Relay, Channel]) -> None:
    relay, far = ends
    relay.channel.send(b"last")
    relay.close()
    assert receive(far, 1) == [b"last"]
    assert wait([far], 60)
    with pytest.raises(ChannelClosed):
        far.receive()


def test_the_end_of_the_connection_comes_after_the_last_frames(ends: tuple[Relay, Channel]) -> None:
    relay, far = ends
    far.send(b"last")
    far.close()
    assert receive(relay.channel, 1) == [b"last"]
    assert wait([relay.channel], 60)
    with pytest.raises(ChannelClosed):
        relay.channel.receive()
