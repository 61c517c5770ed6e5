"""The measured topology that the planner gets: from a file of the doctor, or measured between nodes at their start."""

import time
from collections.abc import Mapping
from pathlib import Path

import shoal
from shoal.config.engine_options import EngineOptions
from shoal.errors import ConfigError
from shoal.launch.node_pool import NodePool, WaitingNode
from shoal.log import get_logger
from shoal.planner.host_links import Measured, PlacedHost
from shoal.transport.pair_speed import PairServer, measure_pairs
from shoal.values import numbered
from shoal.wire.nodes import AwaitPairs, MeasurePairs, PairsAwaited, PairsMeasured
from shoal.wire.topology import ClusterTopology, HostTopology, read_topology

log = get_logger("links")

MEASURE_FLAG = "--measure-links"
_LISTEN_S = 2.0  # how long nodes may take to listen
_PAIRS_S = 4.0  # the longest time for all pairs of hosts
_STREAM_S = 0.05  # how long the bandwidth of one direction is measured
_GRACE_S = 1.0  # how much later an answer may come


def read_measured(options: EngineOptions) -> Measured | None:
    """Return the topology in the file of --topology; None if it is not given, or if another host leads and reads it.

    Raises:
        ConfigError: the file cannot be read or is no topology; or the options contradict each other.
    """
    file = options.nodes.topology
    if file is None or options.nodes.node_rank:
        return None
    source = f"--topology {file}"
    if options.nodes.measure_links:
        raise ConfigError(f"{source} has measured links, and {MEASURE_FLAG} measures them again: leave one of them out")
    try:
        found = read_topology(Path(file).read_bytes())
    except OSError as error:
        raise ConfigError(
            f"{source} cannot be read: {error.strerror}; `shoal doctor --output FILE` writes such a file"
        ) from None
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    if not found.hosts:
        raise ConfigError(f"{source} has no hosts: give the file that `shoal doctor --output FILE` has written")
    return Measured(found, source)


def expected_hosts(measured: Measured | None, count: int, own_name: str) -> list[PlacedHost]:
    """Return the hosts of a replica before any of them has come: those of the topology, in the order of their ranks.

    Without a topology they have made-up addresses.

    Raises:
        ConfigError: the topology has fewer hosts.
    """
    if measured is None:
        return [PlacedHost(own_name, f"host {number}") for number in range(count)]
    known = sorted(measured.topology.hosts, key=lambda host: host.rank)
    if len(known) < count:
        raise ConfigError(
            f"{measured.source} has {numbered(len(known), 'host')}, but a replica has {count}: run `shoal doctor "
            f"--output FILE` on all of them together, with --nnodes {count}"
        )
    return [PlacedHost(host.name, host.address) for host in known[:count]]


class PairMeasurement:
    """The part of one node in a measurement of links. A mistake is told to the leader, and ends nothing here."""

    def __init__(self) -> None:
        self._server: PairServer | None = None

    def listen(self, order: AwaitPairs) -> PairsAwaited | PairsMeasured:
        self.close()
        try:
            self._server = PairServer(order.address)
        except ConfigError as error:
            return PairsMeasured(error=str(error))
        return PairsAwaited(self._server.place)

    def measure(self, order: MeasurePairs) -> PairsMeasured:
        """Measure, while the other nodes do the same."""
        if self._server is None:
            return PairsMeasured(error="this node does not listen for others")
        try:
            size = 1 + max(order.places)
            within_s = order.within_s
            pairs = measure_pairs(self._server, order.rank, size, order.places, stream_s=_STREAM_S, within_s=within_s)
            return PairsMeasured(pairs)
        finally:
            self.close()

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None


def measure_links(pool: NodePool, nodes: Mapping[int, WaitingNode | None], own: HostTopology) -> Measured:
    """Measure the links between the hosts of a replica, within some seconds.

    It never fails: what could not be measured is logged, and missing in the result.

    Args:
        nodes: by number; None for this host.
        own: this host.
    """
    began = time.monotonic()
    hosts = tuple(
        HostTopology(name=own.name if node is None else node.host, rank=rank, address=_address(node, own))
        for rank, node in enumerate(nodes.values())
    )
    rank_of = {number: rank for rank, number in enumerate(nodes)}
    others = {number: node for number, node in nodes.items() if node is not None}
    here = PairMeasurement()  # this host has the lowest rank, so it only answers
    try:
        answers = dict(pool.ask({number: AwaitPairs(node.address) for number, node in others.items()}, _LISTEN_S))
        answers |= {number: here.listen(AwaitPairs(own.address)) for number in nodes if number not in others}
        awaited = {number: answer.place for number, answer in answers.items() if isinstance(answer, PairsAwaited)}
        places = {rank_of[number]: place for number, place in awaited.items()}
        orders = {number: MeasurePairs(rank_of[number], places, _PAIRS_S) for number in awaited if number in others}
        told = pool.ask(orders, _PAIRS_S + _GRACE_S)
    finally:
        here.close()
    measured = [answer for answer in (*answers.values(), *told.values()) if isinstance(answer, PairsMeasured)]
    pairs = tuple(pair for each in measured for pair in each.pairs)
    problems = [each.error for each in measured if each.error]
    problems += [
        f"{hosts[each.source].name} to {hosts[each.target].name}: {each.error}" for each in pairs if each.error
    ]
    silent = [number for number in others if number not in answers or (number in orders and number not in told)]
    problems += [f"no answer from {others[number].name}" for number in silent]
    for problem in problems:
        log.warning("%s: %s", MEASURE_FLAG, problem)
    took = time.monotonic() - began
    log.info("%s: measured the links between %s in %.1f s", MEASURE_FLAG, numbered(len(hosts), "host"), took)
    return Measured(ClusterTopology(shoal=shoal.__version__, hosts=hosts, pairs=pairs), MEASURE_FLAG)


def _address(node: WaitingNode | None, own: HostTopology) -> str:
    return own.address if node is None else node.address
