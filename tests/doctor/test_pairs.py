"""Doctors that meet at a rendezvous and measure the connections between them, as threads of one process."""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from shoal.doctor import pairs
from shoal.doctor.meeting import RoomPeers
from shoal.doctor.settings import Settings
from shoal.errors import ConfigError
from shoal.transport import pair_speed
from shoal.wire.credentials import NO_CREDENTIALS
from shoal.wire.topology import PairAddress
from support.hosts import free_port

WAIT_S = 20.0


def together(size: int, work: Callable[[RoomPeers], object]) -> list[object]:
    """Let `size` doctors meet on the loopback, run `work` in each, and return the results by rank."""
    port = free_port()

    def run(rank: int) -> object:
        settings = Settings(nnodes=size, node_rank=rank, master="127.0.0.1", master_port=port, timeout_s=WAIT_S)
        peers = RoomPeers(settings, NO_CREDENTIALS, opens=rank == 0)
        try:
            return work(peers)
        finally:
            peers.close()

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])
def test_every_pair_has_a_round(size: int) -> None:
    found = pair_speed.rounds(size)
    assert sorted(pair for each in found for pair in each) == list(itertools.combinations(range(size), 2))
    for each in found:
        hosts = [rank for pair in each for rank in pair]
        assert len(hosts) == len(set(hosts)), "a host has one partner at a time"


def test_all_get_the_payloads_of_all() -> None:
    found = together(3, lambda peers: peers.exchange("topic", f"from {peers.rank}".encode(), WAIT_S))
    assert found == [{rank: f"from {rank}".encode() for rank in range(3)}] * 3


def test_a_host_that_leaves_is_missing() -> None:
    def work(peers: RoomPeers) -> list[int]:
        return [] if peers.rank == 2 else sorted(peers.exchange("topic", b"", WAIT_S))

    assert together(3, work) == [[0, 1], [0, 1], []]


def test_every_pair_is_measured_in_both_directions() -> None:
    found = together(3, lambda peers: pairs.measure(peers, WAIT_S))
    measured = {(pair.source, pair.target): pair for each in found for pair in each}  # type: ignore[attr-defined]
    assert set(measured) == set(itertools.permutations(range(3), 2))
    for pair in measured.values():
        assert not pair.error
        assert 0 < pair.latency_us < 1e5
        assert pair.bandwidth > 1e6
        assert abs(pair.clock_offset_s) < 0.1, "all have the same clock"


def test_a_host_that_cannot_be_reached() -> None:
    place = PairAddress(address="127.0.0.1", port=free_port(), token="0" * 32)
    (pair,) = pair_speed.measure_pair(1, 0, place)
    assert (pair.source, pair.target, pair.bandwidth) == (1, 0, None)
    assert pair.error.startswith(f"no connection to 127.0.0.1:{place.port}: ")


def test_a_stranger_gets_no_answer() -> None:
    with pair_speed.PairServer("127.0.0.1") as server:
        other = PairAddress(address=server.place.address, port=server.place.port, token="x" * 32)
        (pair,) = pair_speed.measure_pair(1, 0, other)
        assert pair.error
        there, back = pair_speed.measure_pair(2, 0, server.place)
        assert (there.error, back.error) == ("", "")
        server.await_end(2, WAIT_S)


def test_a_host_that_does_not_come() -> None:
    settings = Settings(nnodes=2, node_rank=0, master="127.0.0.1", master_port=free_port(), timeout_s=0.3)
    with pytest.raises(ConfigError, match="rank 1 missing"):
        RoomPeers(settings, NO_CREDENTIALS, opens=True)
