"""The placement of the ranks of a replica on its hosts."""

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.config.engine_options import EngineOptions
from shoal.config.option_forms import Placement
from shoal.errors import ConfigError
from shoal.planner.host_order import order_hosts
from shoal.planner.host_traffic import MeasuredStep, host_exchanges, shown_time
from shoal.values import numbered
from shoal.wire.base import Ids
from shoal.wire.hosts import HostFacts
from shoal.wire.plan import ModelFiles

ANYWHERE = "auto"
TP_ACROSS = "tp-across"


@dataclass(frozen=True, slots=True)
class ReplicaHost:
    """A host that runs ranks of a replica: what it has, and the options that were given there."""

    options: EngineOptions
    facts: HostFacts
    files: ModelFiles | None = None  # where the models lie on it; None: where the planner reads them
    address: str = ""  # as the other hosts of the replica reach it; "": there are no others
    here: bool = True  # it is the host of the engine
    number: int = 0  # among the nodes of all replicas

    @property
    def devices(self) -> int:
        return self.facts.hardware.num_devices


def place_ranks(
    hosts: Sequence[ReplicaHost],
    *,
    tp: int,
    stages: int,
    wanted: Placement,
    reasons: list[str],
    warnings: list[str],
    step: MeasuredStep | None = None,
) -> tuple[Ids, ...]:
    """Return the ranks of each host.

    A tensor-parallel group stays on one host if each host has room for at least one, so that only the residual stream
    between stages crosses hosts. Otherwise ranks are dealt out in order, as evenly as the devices allow. Measured links
    change which host gets which of these ranks.

    Args:
        tp: tensor-parallel ranks of a stage.
        stages: pipeline stages.
        wanted: the value of --placement.
        reasons, warnings: lines for the log; this function appends its own.
        step: the measured links between the hosts, and the step that is to be fast; None: nothing was measured.

    Raises:
        ConfigError: the hosts have too few devices, or `wanted` does not fit.
    """
    world = tp * stages
    _check_hosts(hosts, world)
    if len(hosts) == 1:
        return (tuple(range(world)),)
    room = _room(hosts, world, warnings)
    if not isinstance(wanted, str):
        placed, why = _as_listed(hosts, wanted, world), "as --placement asks"
    elif wanted == TP_ACROSS:
        placed, why = _across(hosts, tp, stages), "as --placement tp-across asks"
    else:
        placed, why = _automatic(room, tp, stages)
        if step is not None:
            placed = _on_fast_links(hosts, placed, room, tp, step, reasons)
    for host, ranks, most in zip(hosts, placed, room, strict=True):
        if len(ranks) > most:
            raise ConfigError(
                f"{host.facts.name} would run {len(ranks)} ranks, but has {numbered(host.devices, 'device')}: choose "
                "another --placement, or use fewer ranks"
            )
    listed = ", ".join(
        f"{numbers(ranks)} on {host.facts.name} ({host.address})" for host, ranks in zip(hosts, placed, strict=True)
    )
    reasons.append(f"ranks {listed}: {why}")
    return placed


def _check_hosts(hosts: Sequence[ReplicaHost], world: int) -> None:
    kinds = {host.facts.hardware.device for host in hosts}
    if len(kinds) > 1:
        found = ", ".join(f"{host.facts.name} has {host.facts.hardware.device}" for host in hosts)
        raise ConfigError(f"the hosts of a replica must have devices of one kind, but {found}: give all --device cpu")
    _check_shared_gpus(hosts)
    if world < len(hosts):
        raise ConfigError(
            f"a layout of {numbered(world, 'rank')} cannot use {len(hosts)} hosts: lower --nnodes, or raise "
            "--tensor-parallel-size or --pipeline-parallel-size"
        )


def _check_shared_gpus(hosts: Sequence[ReplicaHost]) -> None:
    """Check that no GPU belongs to two nodes on one host, as Ray allows: NCCL cannot connect ranks that share one."""
    owners: dict[tuple[str, str], ReplicaHost] = {}
    for host in hosts:
        hardware = host.facts.hardware
        for gpu in hardware.visible if hardware.device == "cuda" else ():
            other = owners.setdefault((host.address, gpu), host)
            if other is not host:
                raise ConfigError(
                    f"nodes {other.number} and {host.number} of this replica share GPU {gpu} of {host.facts.name} "
                    f"({host.address}), but ranks of one replica can't: let each take more than half of a GPU "
                    "(--ray-resources or VLLM_RAY_PER_WORKER_GPUS), or use replicas of one rank"
                )


def _room(hosts: Sequence[ReplicaHost], world: int, warnings: list[str]) -> list[int]:
    """Return how many ranks each host may run: one per device, unless ranks may share devices."""
    total = sum(host.devices for host in hosts)
    if world <= total:
        return [host.devices for host in hosts]
    found = ", ".join(f"{host.facts.name} has {host.devices}" for host in hosts)
    if not all(host.facts.hardware.devices_shareable for host in hosts):
        raise ConfigError(
            f"{numbered(world, 'rank')} need as many devices, but all hosts together have {total} ({found}): lower "
            f"--tensor-parallel-size or --pipeline-parallel-size, or add hosts"
        )
    warnings.append(f"{numbered(world, 'rank')} share {total} devices ({found}): steps will be slow")
    return [world] * len(hosts)


def _automatic(room: Sequence[int], tp: int, stages: int) -> tuple[tuple[Ids, ...], str]:
    groups = [most // tp for most in room]
    if min(groups) >= 1 and sum(groups) >= stages >= len(room):
        counts = [tp * count for count in _dealt(groups, stages)]
        return _in_order(counts), "each tensor-parallel group is on one host"
    counts = _dealt(room, tp * stages)
    cause = "there are fewer stages than hosts" if stages < len(room) else "not every host has room for a whole one"
    return _in_order(counts), f"tensor-parallel groups cross hosts, as {cause}"


def _on_fast_links(
    hosts: Sequence[ReplicaHost],
    placed: tuple[Ids, ...],
    room: Sequence[int],
    tp: int,
    step: MeasuredStep,
    reasons: list[str],
) -> tuple[Ids, ...]:
    """Give each list of ranks to the host where the exchanges of a step take the least time."""
    exchanges = host_exchanges(tp, step.layers, placed)
    order = order_hosts(exchanges, [len(ranks) for ranks in placed], room, step)
    before, after = (shown_time(step.seconds(exchanges, each)) for each in (None, order))
    if order == tuple(range(len(hosts))):
        reasons.append("the measured links leave the hosts in the order of their numbers")
        return placed
    listed = ", ".join(f"{hosts[host].facts.name} ({hosts[host].address})" for host in order)
    reasons.append(
        f"the measured links put the hosts into the order {listed}: what they exchange in a step of "
        f"{numbered(step.tokens, 'token')} takes about {after} instead of {before} in the order of their numbers"
    )
    taken = dict(zip(order, placed, strict=True))
    return tuple(taken[host] for host in range(len(hosts)))


def _dealt(room: Sequence[int], count: int) -> list[int]:
    """Deal out `count` things one by one, each to the host with the fewest that has room. Return each host's number."""
    dealt = [0] * len(room)
    for _ in range(count):
        host = min((i for i in range(len(room)) if dealt[i] < room[i]), key=lambda i: dealt[i])
        dealt[host] += 1
    return dealt


def _in_order(counts: Sequence[int]) -> tuple[Ids, ...]:
    firsts = [sum(counts[:i]) for i in range(len(counts))]
    return tuple(tuple(range(first, first + count)) for first, count in zip(firsts, counts, strict=True))


def _across(hosts: Sequence[ReplicaHost], tp: int, stages: int) -> tuple[Ids, ...]:
    """Spread each tensor-parallel group over all hosts."""
    if tp < len(hosts):
        raise ConfigError(
            f"--placement tp-across: {numbered(tp, 'tensor-parallel rank')} cannot be spread over {len(hosts)} hosts"
        )
    return ranks_across(tp, stages, len(hosts))


def ranks_across(tp: int, stages: int, hosts: int) -> tuple[Ids, ...]:
    """Return the ranks of each host, where each tensor-parallel group is spread over all hosts."""
    host_of = [rank % tp * hosts // tp for rank in range(tp * stages)]
    return tuple(tuple(rank for rank, host in enumerate(host_of) if host == i) for i in range(hosts))


def _as_listed(hosts: Sequence[ReplicaHost], wanted: Sequence[tuple[str, Ids]], world: int) -> tuple[Ids, ...]:
    placed: dict[int, Ids] = {}
    for name, ranks in wanted:
        number = _host_number(hosts, name)
        if number in placed:
            raise ConfigError(f"--placement names {hosts[number].facts.name} twice: give each host one list of ranks")
        placed[number] = ranks
    found = sorted(rank for ranks in placed.values() for rank in ranks)
    if found != list(range(world)):
        raise ConfigError(
            f"--placement must place each of the ranks {numbers(tuple(range(world)))} once, got {numbers(tuple(found))}"
        )
    if idle := [host.facts.name for i, host in enumerate(hosts) if not placed.get(i)]:
        raise ConfigError(f"--placement gives {', '.join(idle)} no ranks: lower --nnodes, or give each host some")
    return tuple(placed[i] for i in range(len(hosts)))


def _host_number(hosts: Sequence[ReplicaHost], name: str) -> int:
    """Return the number of a host that --placement names: its node rank, its name or its address."""
    for i, host in enumerate(hosts):
        if name in (str(i), host.facts.name, host.address):
            return i
    known = ", ".join(f"{i} ({host.facts.name}, {host.address})" for i, host in enumerate(hosts))
    raise ConfigError(f"--placement names {name}, which is none of the hosts: {known}")


def numbers(ranks: Ids) -> str:
    """Return ranks for a message: 0-3, 6."""
    parts: list[str] = []
    start = 0
    for i in range(1, len(ranks) + 1):
        if i == len(ranks) or ranks[i] != ranks[i - 1] + 1:
            parts.append(str(ranks[start]) if i - start == 1 else f"{ranks[start]}-{ranks[i - 1]}")
            start = i
    return ", ".join(parts)
