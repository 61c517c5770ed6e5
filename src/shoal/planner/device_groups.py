"""The devices and cores of a host, ordered so that those near each other go to the same tensor-parallel group."""

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, groupby, pairwise

from shoal.wire.base import Ids
from shoal.wire.topology import Device, DeviceLink, HostTopology

_MOST_TRIED = 8  # devices of which all groups are tried: up to 2520
# Bytes per second and direction by which ways between devices are compared where the vendor's tool states none: a link
# of NVLink or Infinity Fabric, and PCIe by what lies between, from one switch to the connection of two processors.
_LINK = {"nvlink": 25e9, "nvswitch": 25e9, "infinity-fabric": 50e9}
_PCIE = {"PIX": 24e9, "PXB": 22e9, "PHB": 18e9, "NODE": 14e9, "SYS": 10e9}
_UNKNOWN = 5e9

Distance = Callable[[int, int], float]


def group_sizes(ranks: Sequence[int], tp: int) -> list[int]:
    """Return how many of a host's ranks belong to each tensor-parallel group, in the order of the ranks."""
    return [len(list(each)) for _, each in groupby(rank // tp for rank in ranks)]


def group_devices(sizes: Sequence[int], count: int, distance: Distance) -> Ids:
    """Return the devices of a host in the order in which its ranks take them: those of the first group, and so on.

    The sum of the longest distance in each group is the least possible, and then the sum of all distances. With more
    than eight devices, each group first gets the nearest ones that are left, and then two devices are exchanged as long
    as that helps. Of equal groupings the one that is first in the order of the devices is taken; devices that no rank
    needs come last.

    Args:
        sizes: how many devices each group needs; together at most `count`.
        distance: how far two devices are from each other, in any unit.
    """

    def cost(order: Sequence[int]) -> tuple[float, float]:
        return _cost(_groups(order, sizes), distance)

    if count <= _MOST_TRIED:
        return min(_groupings(tuple(range(count)), tuple(sizes)), key=cost)
    best = min(tuple(range(count)), _nearest(sizes, count, distance), key=cost)
    least = cost(best)
    improved = True
    while improved:
        improved = False
        for first, second in combinations(range(count), 2):
            changed = list(best)
            changed[first], changed[second] = changed[second], changed[first]
            if (found := cost(changed)) < least:
                best, least, improved = tuple(changed), found, True
    return tuple(device for group in _groups(best, sizes) for device in sorted(group)) + best[sum(sizes) :]


def _nearest(sizes: Sequence[int], count: int, distance: Distance) -> Ids:
    """Give each group the first device that is left, and then those that are nearest to it."""
    left, order = list(range(count)), []
    for size in sizes:
        first = left[0]
        group = sorted(left, key=lambda device: (distance(first, device) if device != first else -1.0, device))[:size]
        order += sorted(group)
        left = [device for device in left if device not in group]
    return (*order, *left)


def _groupings(left: Ids, sizes: Ids) -> Iterator[Ids]:
    """Yield the orders of devices of which no two have the same groups."""
    if not sizes:
        yield left
        return
    for group in combinations(left, sizes[0]):
        rest = tuple(device for device in left if device not in group)
        for others in _groupings(rest, sizes[1:]):
            yield (*group, *others)


def _groups(order: Sequence[int], sizes: Sequence[int]) -> list[Sequence[int]]:
    ends = [0]
    for size in sizes:
        ends.append(ends[-1] + size)
    return [order[first:end] for first, end in pairwise(ends)]


def _cost(groups: Sequence[Sequence[int]], distance: Distance) -> tuple[float, float]:
    longest, total = 0.0, 0.0
    for group in groups:
        found = [distance(first, second) for first, second in combinations(group, 2)]
        longest += max(found, default=0.0)
        total += sum(found)
    return round(longest, 9), round(total, 9)


def visible_devices(host: HostTopology, names: Sequence[str], count: int) -> tuple[Device, ...]:
    """Return the devices of a host in the order in which its ranks number them; () if the topology has others.

    Args:
        names: the entries of CUDA_VISIBLE_DEVICES; () if that is not set.
        count: how many of the devices may be used, from the first one on.
    """
    found = tuple(host.devices)
    if names:
        named = [next((each for each in host.devices if _means(name, each)), None) for name in names]
        found = tuple(each for each in named if each is not None)
    return found[:count] if len(found) >= count else ()


def _means(name: str, device: Device) -> bool:
    return name == str(device.index) or (len(name) > 4 and device.uuid.startswith(name))


def distances(host: HostTopology, devices: Sequence[Device]) -> Distance:
    """Return the distance between two of these devices: the nanoseconds for a byte, as far as the topology tells."""
    between = {frozenset((link.first, link.second)): link for link in host.links}

    def distance(first: int, second: int) -> float:
        one, other = devices[first], devices[second]
        link = between.get(frozenset((one.index, other.index)))
        speed = _UNKNOWN if link is None else _speed(link)
        return 1e9 / speed + (one.numa != other.numa) * 1e-3  # of equal ways, the one within a NUMA node

    return distance


def _speed(link: DeviceLink) -> float:
    if link.bandwidth:
        return link.bandwidth
    if link.kind in _LINK:
        return _LINK[link.kind] * max(link.links, 1)
    return _PCIE.get(link.path, _UNKNOWN)
