"""The links between nodes, measured over real connections on the loopback; and the file of --topology."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shoal.addresses import Address
from shoal.config.engine_options import EngineOptions
from shoal.errors import ConfigError
from shoal.launch.deployment import NodeGroup
from shoal.launch.measured_links import PairMeasurement, measure_links, read_measured
from shoal.launch.node_pool import NodePool
from shoal.transport.channel import Channel, ChannelClosed, wait
from shoal.transport.connecting import connect
from shoal.transport.rendezvous import Rendezvous
from shoal.wire.base import encode
from shoal.wire.credentials import NO_CREDENTIALS
from shoal.wire.hosts import HostReport
from shoal.wire.nodes import AwaitPairs, MeasurePairs, leader_to_node
from shoal.wire.plan import ModelFiles
from shoal.wire.rendezvous import NODES_DOOR
from shoal.wire.topology import TOPOLOGY_VERSION, ClusterTopology, HostTopology, pretty_document, with_fields
from support.plans import facts

OWN = HostTopology(name="leader", address="127.0.0.1")
REPORT = HostReport(facts(), ModelFiles("/model"), "/model", {})


def obey(node: Channel, pairs: PairMeasurement) -> None:
    """Measure for a leader, until its connection ends."""
    while True:
        try:
            wait([node], 30)
            for frame in node.receive():
                match leader_to_node.decode(frame):
                    case AwaitPairs() as order:
                        node.send(encode(pairs.listen(order)))
                    case MeasurePairs() as order:
                        node.send(encode(pairs.measure(order)))
        except ChannelClosed:
            return


def be_silent(node: Channel, pairs: PairMeasurement) -> None:
    """Be a node that hangs."""


@contextmanager
def pool_of(*nodes: Callable[[Channel, PairMeasurement], None]) -> Iterator[NodePool]:
    """Yield a pool of nodes, which have the numbers from 1 on."""
    size = 1 + len(nodes)
    pool = NodePool(NodeGroup(size, 0, 1, Address("127.0.0.1", 29501), NO_CREDENTIALS), {})
    rendezvous = Rendezvous(doors={NODES_DOOR: pool}, reopen_rooms=True)
    channels, threads = [], []
    for number, run in enumerate(nodes, start=1):
        node = connect(
            Address.parse(rendezvous.address),
            NO_CREDENTIALS,
            room=NODES_DOOR,
            rank=number,
            size=size,
            agreement={},
            report=encode(REPORT),
            timeout=30,
        )
        channels.append(node)
        threads.append(threading.Thread(target=run, args=(node, PairMeasurement())))
        threads[-1].start()
    try:
        yield pool
    finally:
        pool.close()
        rendezvous.close()
        for thread in threads:
            thread.join(30)
        for node in channels:
            node.close()


def test_every_pair_of_hosts_is_measured_in_both_directions() -> None:
    with pool_of(obey, obey) as pool:
        nodes = pool.gather([1, 2], 30)
        found = measure_links(pool, {0: None, **nodes}, OWN).topology
    leader = found.hosts[0]
    assert (leader.rank, leader.name, leader.address) == (0, "leader", "127.0.0.1")
    measured = {(pair.source, pair.target) for pair in found.pairs if pair.latency_us and pair.bandwidth}
    assert measured == {(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)}


def test_a_leader_that_is_no_node_takes_no_part() -> None:
    with pool_of(obey, obey) as pool:
        found = measure_links(pool, dict(pool.gather([1, 2], 30)), OWN).topology
    assert {(pair.source, pair.target) for pair in found.pairs} == {(0, 1), (1, 0)}


@pytest.mark.slow  # it waits for the node
def test_a_node_that_does_not_answer_is_only_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with pool_of(obey, be_silent) as pool:
        found = measure_links(pool, {0: None, **pool.gather([1, 2], 30)}, OWN).topology
    assert {(pair.source, pair.target) for pair in found.pairs} == {(0, 1), (1, 0)}
    assert any("--measure-links: no answer from node 2" in each.message for each in caplog.records)


def test_an_address_where_a_node_cannot_listen_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with pool_of(obey) as pool:
        found = measure_links(pool, {0: None, **pool.gather([1], 30)}, with_fields(OWN, address="203.0.113.7")).topology
    assert found.pairs == ()
    assert any("can't listen at 203.0.113.7 for other hosts" in each.message for each in caplog.records)


def options(**given: object) -> EngineOptions:
    return EngineOptions.from_flat(None, given)


def test_the_file_of_a_topology_is_read(tmp_path: Path) -> None:
    file = tmp_path / "topology.json"
    topology = ClusterTopology(hosts=(OWN,))
    file.write_text(pretty_document(topology))
    found = read_measured(options(topology=str(file)))
    assert found is not None
    assert (found.topology, found.source) == (topology, f"--topology {file}")
    assert read_measured(options()) is None
    assert read_measured(options(topology="not on this host", node_rank=1)) is None, "host 0 leads"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory; `shoal doctor --output FILE` writes such a file"),
        ("not JSON", "this is no ClusterTopology of Shoal: "),
        (
            '{"findings": [], "topology": {}}',
            "has no hosts: give the file that `shoal doctor --output FILE` has written",
        ),
        (
            pretty_document(ClusterTopology(version=TOPOLOGY_VERSION + 1)),
            f"the topology has version {TOPOLOGY_VERSION + 1}",
        ),
    ],
)
def test_a_file_that_is_no_topology_is_refused(content: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "topology.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=f"^--topology {file}:? {message}"):
        read_measured(options(topology=str(file)))


def test_a_file_and_a_measurement_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="--measure-links measures them again: leave one of them out"):
        read_measured(options(topology="a file", measure_links=True))
