"""Hosts and links of a topology: which are those of a replica, and which topologies are refused."""

from itertools import permutations

import pytest

from shoal.errors import ConfigError
from shoal.planner.host_links import HostLinks, Link, Measured, PlacedHost, find_hosts, host_links
from shoal.wire.topology import ClusterTopology, HostPair, HostTopology, Interface

NAMES = ("a", "b", "c")


def measured(count: int = 3, *pairs: HostPair, name: str = "") -> Measured:
    """Return a topology of hosts a (10.0.0.1), b and c; or hosts with one name. Without pairs, all are measured."""
    hosts = tuple(
        HostTopology(name=name or NAMES[i], rank=i, address=f"10.0.0.{i + 1}", interfaces=(ETHERNET,) if not i else ())
        for i in range(count)
    )
    every = [
        HostPair(source=i, target=j, latency_us=10.0 * (i + j), bandwidth=1e9 / (1 + i))
        for i, j in permutations(range(count), 2)
    ]
    return Measured(ClusterTopology(hosts=hosts, pairs=pairs or tuple(every)), "--topology FILE")


ETHERNET = Interface(name="eth0", addresses=("192.168.0.1",))
HOSTS = tuple(PlacedHost(name, f"10.0.0.{i + 1}") for i, name in enumerate(NAMES))


def names(found: tuple[HostTopology | None, ...]) -> list[str | None]:
    return [None if host is None else host.name for host in found]


def links_of(topology: Measured, *hosts: PlacedHost) -> tuple[HostLinks | None, list[str], list[str]]:
    """Return the links, the reasons and the warnings."""
    reasons: list[str] = []
    warnings: list[str] = []
    found = find_hosts(topology, hosts, warnings)
    return host_links(topology, found, hosts, reasons, warnings), reasons, warnings


def test_hosts_are_found_by_their_address_in_any_order() -> None:
    warnings: list[str] = []
    assert names(find_hosts(measured(), HOSTS[::-1], warnings)) == ["c", "b", "a"]
    assert names(find_hosts(measured(), [PlacedHost("a", "192.168.0.1")], warnings)) == ["a"], "another interface"
    assert names(find_hosts(measured(name="x"), [PlacedHost("x", "10.0.0.2")], warnings)) == ["x"]
    assert names(find_hosts(measured(), [PlacedHost("b")], warnings)) == ["b"], "a replica on one host"
    assert warnings == []


@pytest.mark.parametrize(
    ("host", "message"),
    [
        (
            PlacedHost("z", "10.9.9.9"),
            r"is of other hosts: it has a \(10.0.0.1\), .*, and this replica runs on z \(10.9",
        ),
        (PlacedHost("z"), r"is of other hosts: it has a \(10.0.0.1\), b \(10.0.0.2\), c .* runs on z; write it again"),
        (
            PlacedHost("b", "10.9.9.9"),
            r"has 10.0.0.2 for the host b, which the others reach at 10.9.9.9: write it again",
        ),
        (PlacedHost("z", "10.0.0.2"), r"has the host b at 10.0.0.2, but z is there now: write it again with `shoal"),
    ],
)
def test_a_topology_of_other_hosts_is_refused(host: PlacedHost, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^--topology FILE {message}"):
        find_hosts(measured(), [host], [])


def test_a_host_that_is_missing_is_a_warning_and_its_links_count_as_the_slowest() -> None:
    links, _, warnings = links_of(measured(2), *HOSTS)
    assert links is not None
    assert links.between(2, 0) == links.between(2, 1) == links.between(0, 1)
    (told,) = warnings
    assert told.startswith("--topology FILE has no c (10.0.0.3): links to it are taken to be as slow as the slowest")


def test_a_link_has_the_worse_numbers_of_both_directions() -> None:
    links, reasons, warnings = links_of(measured(), *HOSTS)
    assert links is not None
    assert links.between(0, 1) == Link(10.0 * 1e-6, 0.5e9)
    assert links.slowest([0, 1, 2]) == Link(30.0 * 1e-6, 1e9 / 3)
    assert reasons == [
        "--topology FILE: 3 links between the hosts of a replica, with 30 us, 333 MB/s to 10 us, 500 MB/s"
    ]
    assert warnings == []


def test_nodes_on_one_host_need_no_network() -> None:
    links, _, _ = links_of(measured(2), HOSTS[0], HOSTS[0], HOSTS[1])
    assert links is not None
    assert (links.between(0, 1).latency_s, links.between(0, 1).bandwidth) == (0.0, float("inf"))
    assert links.between(0, 2) == links.between(1, 2)


@pytest.mark.parametrize(
    "pair", [{"error": "no connection"}, {"latency_us": 0.0, "bandwidth": 1e9}, {"latency_us": 5.0}]
)
def test_pairs_without_numbers_are_not_used(pair: dict[str, float | str]) -> None:
    links, reasons, warnings = links_of(measured(2, HostPair(source=0, target=1, **pair)), *HOSTS[:2])  # type: ignore[arg-type]
    assert (links, reasons) == (None, [])
    assert warnings == ["--topology FILE: nothing was measured between these hosts, so it changes nothing"]


def test_a_pair_that_was_not_measured_is_named() -> None:
    only = HostPair(source=0, target=1, latency_us=10.0, bandwidth=1e9)
    links, _, warnings = links_of(measured(3, only), *HOSTS)
    assert links is not None
    assert links.between(1, 2) == links.between(0, 1)
    assert warnings == [
        "--topology FILE: nothing was measured for a (10.0.0.1) - c (10.0.0.3), b (10.0.0.2) - c (10.0.0.3): taken to "
        "be as slow as the slowest link"
    ]


def test_one_host_has_no_links() -> None:
    assert links_of(measured(), HOSTS[0]) == (None, [], [])
