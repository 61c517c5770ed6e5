"""The hosts of a replica as they were measured, and what the planner takes from that: the links and the devices."""

from collections.abc import Sequence

from shoal.config.engine_options import EngineOptions
from shoal.models.manifest import ITEM_BYTES
from shoal.models.spec import ModelSpec
from shoal.planner.device_groups import distances, group_devices, group_sizes, visible_devices
from shoal.planner.host_links import Measured, PlacedHost, find_hosts, host_links
from shoal.planner.host_traffic import MeasuredStep
from shoal.planner.placement import ReplicaHost
from shoal.wire.base import Ids
from shoal.wire.plan import Layout
from shoal.wire.topology import HostTopology

_ASSUMED_BYTES = 2  # of a number, where config.json names no type; the checkpoint is read later


class MeasuredHosts:
    """The measurements of the hosts of a replica, and what follows from them for its placement. There may be none."""

    def __init__(self, hosts: Sequence[ReplicaHost], layout: Layout, reasons: list[str], warnings: list[str]) -> None:
        """Know nothing yet. `reasons`, `warnings`: lines for the log; this object appends its own."""
        self._reasons, self._warnings = reasons, warnings
        self._layout = layout
        self._placed = [PlacedHost(host.facts.name, host.address) for host in hosts]
        self._hosts: tuple[HostTopology | None, ...] = (None,) * len(hosts)
        self.step: MeasuredStep | None = None  # None: nothing was measured between the hosts, or there is only one

    def find(self, measured: Measured | None, spec: ModelSpec, options: EngineOptions) -> None:
        """Find the hosts in a topology, if there is one.

        Raises:
            ConfigError: it is of other hosts.
        """
        if measured is None:
            if options.nodes.measure_links and len(self._placed) > 1:
                self._reasons.append(
                    "--measure-links: the links are measured when the hosts have come, and may change this"
                )
            elif options.nodes.measure_links:
                self._warnings.append("--measure-links changes nothing: the replica has one host")
            return
        self._hosts = find_hosts(measured, self._placed, self._warnings)
        links = host_links(measured, self._hosts, self._placed, self._reasons, self._warnings)
        if links is not None:
            scheduler = options.scheduler
            self.step = MeasuredStep(
                links,
                layers=self._layout.stages or (spec.num_layers,),
                stream_bytes=spec.hidden_size * ITEM_BYTES.get(spec.dtype, _ASSUMED_BYTES),
                tokens=min(scheduler.max_num_seqs, scheduler.max_num_batched_tokens),
            )

    def order_devices(self, hosts: Sequence[ReplicaHost], placed: Sequence[Ids], replicas: int) -> tuple[Ids, ...]:
        """Return the order in which ranks take the devices of each host; (): that of their numbers.

        Args:
            placed: the ranks of each host.
            replicas: how many replicas each host has.
        """
        return tuple(
            ()
            if known is None or host.facts.hardware.device != "cuda"
            else self._group_devices(host, known, ranks, replicas)
            for host, known, ranks in zip(hosts, self._hosts, placed, strict=True)
        )

    def _group_devices(self, host: ReplicaHost, known: HostTopology, ranks: Ids, replicas: int) -> Ids:
        hardware, sizes = host.facts.hardware, group_sizes(ranks, self._layout.tp) * replicas
        devices = visible_devices(known, hardware.visible, hardware.num_devices)
        if not devices:
            self._warnings.append(
                f"{host.facts.name} has {hardware.num_devices} devices, and was measured with {len(known.devices)}: "
                "the links between them are not used"
            )
            return ()
        order = group_devices(sizes, len(devices), distances(known, devices))
        if order == tuple(range(len(devices))):
            return ()
        listed = _listed(order[: sum(sizes)])
        self._reasons.append(
            f"{host.facts.name}: ranks take the devices {listed}, so that groups have the fastest links"
        )
        return order


def _listed(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))
