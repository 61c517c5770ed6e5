"""The connections between the hosts whose doctors have met."""

from shoal.doctor.meeting import Peers
from shoal.transport.pair_speed import PairServer, measure_pairs
from shoal.wire.topology import HostPair, PairAddress, decode_document, encode_document


def measure(peers: Peers, timeout_s: float) -> tuple[HostPair, ...]:
    """Measure the connections between this host and those with lower ranks, while those with higher ranks measure."""
    with PairServer(peers.address) as server:
        posted = peers.exchange("addresses", encode_document(server.place), timeout_s)
        places = {rank: decode_document(PairAddress, place) for rank, place in posted.items()}
        return measure_pairs(server, peers.rank, peers.size, places)
