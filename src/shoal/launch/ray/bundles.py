"""How many ranks each bundle of a placement group has: pure arithmetic about the resources of a Ray cluster."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shoal.config.option_forms import Placement
from shoal.errors import ConfigError
from shoal.planner.placement import ANYWHERE, TP_ACROSS, ranks_across
from shoal.values import numbered

Resources = Mapping[str, float]

_GROUP = "_group_"
_GPU = "GPU"
_UNIT = 1e-4
_MARK = "bundle"  # a resource that Ray itself adds to each bundle


@dataclass(frozen=True, slots=True)
class ClusterNode:
    """A node of a Ray cluster."""

    id: str
    address: str
    total: Resources
    available: Resources


def check_resources(each: Resources) -> None:
    """Check that Ray can give these resources to a rank.

    Raises:
        ConfigError: it cannot.
    """
    gpus = each.get(_GPU, 0)
    if gpus > 1 and not float(gpus).is_integer():
        raise ConfigError(f"a rank can have a part of one GPU, or whole GPUs, but not {gpus:g}: use 1, or less than 1")


def shares_gpu(each: Resources) -> bool:
    """Return whether a rank takes only a part of a GPU."""
    return 0 < each.get(_GPU, 0) < 1


def ranks_that_fit(there: Resources, each: Resources) -> int:
    """Return how many ranks fit into resources, if each rank needs `each`."""
    # Ray counts in units of 1/10000, so sums of fractions are not exact.
    fits = {name: int(there.get(name, 0) / amount + _UNIT) for name, amount in each.items() if amount > 0}
    if shares_gpu(each):  # the parts of several GPUs do not add up
        whole = int(there.get(_GPU, 0) + _UNIT)
        rest = there.get(_GPU, 0) - whole
        fits[_GPU] = whole * int(1 / each[_GPU] + _UNIT) + int(rest / each[_GPU] + _UNIT)
    return min(fits.values())


def bundle_sizes(
    nodes: Sequence[ClusterNode], each: Resources, *, tp: int, stages: int, wanted: Placement
) -> list[int]:
    """Return the number of ranks of each bundle, in the order of the ranks.

    There are as few bundles as the largest node allows, and a tensor-parallel group is not cut if a node has room for
    it. If ranks take parts of GPUs, each has a bundle of its own: Ray would give several of them in one bundle the same
    GPU. Nodes that are not there yet (an autoscaler may add them) are taken to be as large as the largest.

    Args:
        each: the resources of a rank.
        wanted: the value of --placement.

    Raises:
        ConfigError: no node has room for a single rank; or `wanted` does not go together with parts of GPUs.
    """
    world = tp * stages
    if shares_gpu(each) and wanted != ANYWHERE:
        raise ConfigError(
            f"--placement: each rank takes {each[_GPU]:g} GPU, so Ray decides where it runs: leave --placement out, or "
            "use whole GPUs"
        )
    if not isinstance(wanted, str):
        return [len(ranks) for _, ranks in wanted]
    largest = max((ranks_that_fit(node.total, each) for node in nodes), default=0)
    if largest == 0:
        raise ConfigError(f"no node of the Ray cluster has {shown(each)} for a rank: {_held(nodes)}")
    if shares_gpu(each):
        return [1] * world
    if wanted == TP_ACROSS:
        count = max(2, -(-world // largest))
        return [len(ranks) for ranks in ranks_across(tp, stages, count)]
    if largest >= world:
        return [world]
    if largest >= tp:
        groups = _divided(stages, -(-stages // (largest // tp)))
        return [tp * count for count in groups]
    return _divided(world, -(-world // largest))


def check_totals(nodes: Sequence[ClusterNode], each: Resources, sizes: Sequence[int]) -> None:
    """Check that the nodes of a cluster without an autoscaler could have all bundles, if nothing else ran there.

    Raises:
        ConfigError: they could not; the message has the arithmetic.
    """
    room = sorted((ranks_that_fit(node.total, each) for node in nodes), reverse=True)
    for size in sorted(sizes, reverse=True):
        if not room or room[0] < size:
            wanted = " + ".join(map(str, sizes))
            raise ConfigError(
                f"{numbered(sum(sizes), 'rank')} need {shown({name: sum(sizes) * n for name, n in each.items()})} in "
                f"bundles of {wanted} ranks, and the Ray cluster has {_held(nodes)}: use fewer ranks, or add nodes"
            )
        room = sorted([room[0] - size, *room[1:]], reverse=True)


def ranks_of_bundles(
    bundles: Sequence[Resources], each: Resources, world: int, own: Mapping[int, Resources]
) -> dict[int, int]:
    """Return how many ranks run in each bundle of a placement group that somebody else has made.

    If ranks take parts of GPUs, a bundle gets one rank at most.

    Args:
        bundles: the resources of each bundle, by index.
        each: the resources of a rank.
        world: the number of ranks.
        own: what this process itself uses of the bundles.

    Raises:
        ConfigError: the bundles have too little room.
    """
    found: dict[int, int] = {}
    left = world
    for index, bundle in enumerate(bundles):
        free = {name: amount - own.get(index, {}).get(name, 0) for name, amount in bundle.items()}
        count = min(left, ranks_that_fit(free, each), 1 if shares_gpu(each) else left)
        if count > 0:
            found[index] = count
            left -= count
    if left:
        has = "; ".join(shown(bundle) for bundle in bundles)
        raise ConfigError(
            f"{numbered(world, 'rank')} need {shown({name: world * amount for name, amount in each.items()})}, but the "
            f"placement group of this process has room for {world - left}: its bundles are {has}"
        )
    return found


def own_share(assigned: Resources) -> dict[int, dict[str, float]]:
    """Return what a process uses of the bundles of its placement group, from the resources that Ray assigned to it.

    Ray names them after the bundle: `CPU_group_0_<id>`.
    """
    found: dict[int, dict[str, float]] = {}
    for name, amount in assigned.items():
        kind, marker, rest = name.rpartition(_GROUP)
        index = rest.partition("_")[0]
        if marker and index.isdigit() and "_" in rest and kind != _MARK:
            found.setdefault(int(index), {})[kind] = amount
    return found


def shown(resources: Resources) -> str:
    """Return resources for a message: `2 GPU, 8 CPU`."""
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())


def _divided(count: int, parts: int) -> list[int]:
    """Divide a number into parts that differ by one at most."""
    return [count // parts + (i < count % parts) for i in range(parts)]


def _held(nodes: Sequence[ClusterNode]) -> str:
    if not nodes:
        return "no nodes"
    return "; ".join(
        f"{node.address}: {shown({name: n for name, n in node.total.items() if name in ('CPU', 'GPU')})}"
        for node in nodes
    )
