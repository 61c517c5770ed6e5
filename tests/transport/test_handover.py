"""Tests of channels that are handed over to another process of the host."""

import os
import socket
from collections.abc import Iterator

import pytest

from shoal.transport.channel import Channel, ChannelClosed, wait
from shoal.transport.handover import ChannelReceiver, hand_over

PID = 2**31 - 1  # any number: nobody looks for the process


@pytest.fixture
def receiver() -> Iterator[ChannelReceiver]:
    made = ChannelReceiver()
    yield made
    made.close()


def test_frames_of_before_and_after_arrive_at_the_new_owner(receiver: ChannelReceiver) -> None:
    ours, theirs = Channel.pair()
    process = Channel(theirs)
    ours.send(b"order")
    process.send(b"early answer")
    assert hand_over(ours, PID, receiver.name)
    taken = receiver.take(PID)
    assert taken is not None
    process.send(b"late answer")
    taken.send(b"another order")
    assert wait([taken], 10) == [taken]
    assert taken.receive() == [b"early answer", b"late answer"]
    assert process.receive() == [b"order", b"another order"]
    taken.close()
    with pytest.raises(ChannelClosed):  # the former owner keeps no copy that would hide the end of the new one
        process.receive()
    process.close()


def test_each_channel_has_the_number_of_its_process(receiver: ChannelReceiver) -> None:
    processes = {}
    for pid in (5, 6, 7):
        ours, theirs = Channel.pair()
        processes[pid] = Channel(theirs)
        assert hand_over(ours, pid, receiver.name)
    for pid in (7, 5, 6):
        taken = receiver.take(pid)
        assert taken is not None
        taken.send(b"%d" % pid)
        assert processes[pid].receive() == [b"%d" % pid]
        assert receiver.take(pid) is None
        taken.close()
        processes[pid].close()


def test_without_a_receiver_the_owner_keeps_its_channel() -> None:
    ours, theirs = Channel.pair()
    closed = ChannelReceiver()
    closed.close()
    assert not hand_over(ours, PID, closed.name)
    ours.send(b"frame")
    process = Channel(theirs)
    assert process.receive() == [b"frame"]
    ours.close()
    process.close()


@pytest.mark.parametrize("side", ["read", "written"])
def test_a_channel_with_bytes_on_their_way_is_kept(receiver: ChannelReceiver, side: str) -> None:
    ours, theirs = Channel.pair()
    with theirs:
        if side == "read":
            theirs.sendall(b"\x05\x00\x00\x00par")
            assert ours.receive() == []
        else:
            ours.send(bytes(10_000_000))  # more than a socket takes
        assert not hand_over(ours, PID, receiver.name)
        assert receiver.take(PID) is None
    ours.close()


def test_programs_of_other_users_cannot_hand_over(receiver: ChannelReceiver, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = Channel.pair()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert not hand_over(ours, PID, receiver.name)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.connect(f"\0{receiver.name}")
        socket.send_fds(stranger, [PID.to_bytes(8, "little")], [ours.fileno()])
    assert receiver.take(PID) is None
    ours.close()
    theirs.close()
