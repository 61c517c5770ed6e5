"""The measured links between the hosts of a replica, from a topology: which host is which, and how fast they are."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from shoal.errors import ConfigError
from shoal.wire.topology import ClusterTopology, HostPair, HostTopology


@dataclass(frozen=True, slots=True)
class Measured:
    """A measured topology, and where it is from, for messages: `--topology FILE` or `--measure-links`."""

    topology: ClusterTopology
    source: str


@dataclass(frozen=True, slots=True)
class PlacedHost:
    """A host of a replica, as a topology may know it."""

    name: str
    address: str = ""  # as the other hosts of the replica reach it; "": there are no others

    def __str__(self) -> str:
        return f"{self.name} ({self.address})" if self.address else self.name


@dataclass(frozen=True, slots=True)
class Link:
    """The way between two hosts."""

    latency_s: float
    bandwidth: float  # bytes per second, in the slower direction

    def __str__(self) -> str:
        return f"{_short(self.latency_s * 1e6)} us, {_short(self.bandwidth / 1e6)} MB/s"


def _short(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


_SAME_HOST = Link(0.0, float("inf"))


@dataclass(frozen=True, slots=True)
class HostLinks:
    """The links between the hosts of a replica, which are numbered in the order of the plan."""

    links: Mapping[tuple[int, int], Link]  # (lower, higher number) -> their link; of every pair

    def between(self, first: int, second: int) -> Link:
        return self.links[min(first, second), max(first, second)]

    def slowest(self, hosts: Iterable[int]) -> Link:
        """Return the greatest latency and the lowest bandwidth between any two of these hosts."""
        found = [self.links[pair] for pair in combinations(sorted(hosts), 2)]
        return Link(max(each.latency_s for each in found), min(each.bandwidth for each in found))


def find_hosts(measured: Measured, hosts: Sequence[PlacedHost], warnings: list[str]) -> tuple[HostTopology | None, ...]:
    """Return each host of a replica as the topology has it; None for hosts that are missing there.

    A host is found by its address, or by its name if it has no address. A host that is missing is only a warning, since
    a spare host may have taken the place of one that was measured, and a placement without measurements works too.

    Raises:
        ConfigError: the topology is of other hosts: it has none of them, or another name or address for one of them.
    """
    found = tuple(_find(measured, host) for host in hosts)
    missing = ", ".join(str(host) for host, known in zip(hosts, found, strict=True) if known is None)
    if missing and not any(found):
        raise ConfigError(
            f"{measured.source} is of other hosts: it has {_listed(measured.topology)}, and this replica runs on "
            f"{missing}; {_AGAIN}"
        )
    if missing:
        warnings.append(
            f"{measured.source} has no {missing}: links to it are taken to be as slow as the slowest one measured; "
            f"{_AGAIN}"
        )
    return found


_AGAIN = "write it again with `shoal doctor --output FILE`, run on these hosts"


def _find(measured: Measured, host: PlacedHost) -> HostTopology | None:
    known = measured.topology.hosts
    named = [each for each in known if each.name == host.name]
    if not host.address:
        return named[0] if len(named) == 1 else None
    here = [each for each in known if host.address in _addresses(each)]
    if not here and len(named) == 1:
        raise ConfigError(
            f"{measured.source} has {named[0].address or 'no address'} for the host {host.name}, which the others "
            f"reach at {host.address}: {_AGAIN}"
        )
    if here and host.name != here[0].name:
        raise ConfigError(
            f"{measured.source} has the host {here[0].name} at {host.address}, but {host.name} is there now: {_AGAIN}"
        )
    return here[0] if here else None


def _addresses(host: HostTopology) -> set[str]:
    return {host.address, *(address for each in host.interfaces for address in each.addresses)} - {""}


def _listed(topology: ClusterTopology) -> str:
    return ", ".join(f"{host.name} ({host.address})" if host.address else host.name for host in topology.hosts)


def host_links(
    measured: Measured,
    found: Sequence[HostTopology | None],
    hosts: Sequence[PlacedHost],
    reasons: list[str],
    warnings: list[str],
) -> HostLinks | None:
    """Return the links between the hosts of a replica; None if there is only one, or nothing was measured.

    A pair without a measurement gets the greatest latency and the lowest bandwidth of all, so that it is not preferred.

    Args:
        found: the hosts, as `find_hosts` returned them.
        reasons, warnings: lines for the log; this function appends its own.
    """
    if len(hosts) < 2:
        return None
    directions = {(pair.source, pair.target): pair for pair in measured.topology.pairs}
    links: dict[tuple[int, int], Link] = {}
    unknown: list[tuple[int, int]] = []
    for first, second in combinations(range(len(hosts)), 2):
        one, other = found[first], found[second]
        if one is not None and one is other:
            links[first, second] = _SAME_HOST
        elif one is not None and other is not None and (link := _link(directions, one.rank, other.rank)) is not None:
            links[first, second] = link
        else:
            unknown.append((first, second))
    known = [link for link in links.values() if link is not _SAME_HOST]
    if not known:
        warnings.append(f"{measured.source}: nothing was measured between these hosts, so it changes nothing")
        return None
    slowest = Link(max(each.latency_s for each in known), min(each.bandwidth for each in known))
    if missing := [pair for pair in unknown if found[pair[0]] is not None and found[pair[1]] is not None]:
        names = ", ".join(f"{hosts[first]} - {hosts[second]}" for first, second in missing)
        warnings.append(f"{measured.source}: nothing was measured for {names}: taken to be as slow as the slowest link")
    fastest = Link(min(each.latency_s for each in known), max(each.bandwidth for each in known))
    same = "" if len(known) == 1 else f" to {fastest}"
    counted = "1 link" if len(known) == 1 else f"{len(known)} links"
    reasons.append(f"{measured.source}: {counted} between the hosts of a replica, with {slowest}{same}")
    return HostLinks({**links, **dict.fromkeys(unknown, slowest)})


def _link(directions: Mapping[tuple[int, int], HostPair], first: int, second: int) -> Link | None:
    """Return what was measured between two hosts, in both directions or in one."""
    pairs = [directions.get((first, second)), directions.get((second, first))]
    latencies = [each.latency_us for each in pairs if each and each.latency_us is not None and each.latency_us > 0]
    speeds = [each.bandwidth for each in pairs if each and each.bandwidth is not None and each.bandwidth > 0]
    return Link(max(latencies) * 1e-6, min(speeds)) if latencies and speeds else None
