"""A run of the doctor over a Ray cluster: Ray starts a doctor on each node, and they meet as those of hosts do."""

import dataclasses
import importlib.metadata
import secrets
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shoal import env
from shoal.addresses import Address
from shoal.doctor import compare, ray_checks, runs
from shoal.doctor.examine import examine_host, report_of_host
from shoal.doctor.meeting import RoomPeers
from shoal.doctor.ray_checks import RayNode
from shoal.doctor.settings import Settings
from shoal.launch.credentials import credentials_of_host, log_protection
from shoal.launch.ray import cluster
from shoal.launch.ray.node_tasks import NodeTasks
from shoal.log import configure_logging
from shoal.transport.rendezvous import Rendezvous
from shoal.wire.doctor import DoctorReport, Finding
from shoal.wire.topology import ClusterTopology, HostTopology, with_fields

FLAG = "--ray"
_KEY_BYTES = 32
_MEASURE_S = 120.0  # the longest time for pairs and all-reduces, beside the waits of the settings
_CLUSTER = "Ray cluster"


@dataclass(frozen=True, slots=True)
class DoctorOrder:
    """Everything that a doctor on a node must know."""

    settings: Settings
    key: str  # the shared key of the meeting


def run(settings: Settings, address: str | None) -> DoctorReport:
    """Examine all nodes of a Ray cluster, and return the report about all of them.

    Args:
        settings: of the run; those about the hosts are made here.
        address: host:port of the cluster; None: RAY_ADDRESS, or the cluster of this host.

    Raises:
        ConfigError: Ray is not installed, there is no cluster, or this host cannot listen for its nodes.
    """
    cluster.connect(address, FLAG, own_cluster=False, show_tasks=False)
    try:
        return _run(settings)
    finally:
        cluster.disconnect()


def _run(settings: Settings) -> DoctorReport:
    own = cluster.own_address()
    alive = [RayNode(each.id, each.address, each.total) for each in cluster.nodes()]
    alive.sort(key=lambda node: (node.address != own, node.address, node.id))  # the one of this host has rank 0
    nodes = [*alive, *(RayNode(each.id, each.address, dead=each.reason) for each in cluster.dead_nodes())]
    names, failed = NodeTasks(introduce, dict.fromkeys((node.id for node in alive), "")).results(settings.timeout_s)
    present = [node for node in alive if node.id in names]
    here = named[1] if (named := env.host_ip()) else own
    key = env.cluster_key() or secrets.token_hex(_KEY_BYTES)
    credentials = credentials_of_host(settings.tls, key)
    log_protection(credentials, here)
    rendezvous = Rendezvous(here, 0, credentials=credentials)
    try:
        meeting = Address.parse(rendezvous.address)
        of_node = {
            node.id: DoctorOrder(
                dataclasses.replace(
                    settings, nnodes=len(present), node_rank=rank, master=meeting.host, master_port=meeting.port
                ),
                key,
            )
            for rank, node in enumerate(present)
        }
        longest = settings.local_timeout_s + 3 * settings.timeout_s + _MEASURE_S
        reports, ended = NodeTasks(examine_node, of_node).results(longest)
    finally:
        rendezvous.close()
    return merge(nodes, [reports.get(node.id) for node in present], present, {**failed, **ended})


def introduce(_: str) -> str:
    """Return the name of the host. A node that cannot run this cannot run a doctor either."""
    return socket.gethostname()


def examine_node(order: DoctorOrder) -> DoctorReport:
    """Examine the node where this runs, together with the other ones."""
    settings = order.settings
    configure_logging(f"(doctor {settings.node_rank}) ")
    if not settings.several_hosts:
        return report_of_host(examine_host(settings))
    credentials = credentials_of_host(settings.tls, order.key)
    versions = {"Ray": importlib.metadata.version("ray")}
    return runs.examine_with(settings, lambda: RoomPeers(settings, credentials, opens=False), versions=versions)


def merge(
    nodes: Sequence[RayNode],
    reports: Sequence[DoctorReport | None],
    present: Sequence[RayNode],
    failed: Mapping[str, str],
) -> DoctorReport:
    """Return one report: the one about the most hosts, those of hosts that are not in it, and what concerns Ray.

    Args:
        nodes: all nodes of the cluster.
        reports: those of the present nodes, by rank; None for those without one.
        present: the nodes where doctors were started, by rank.
        failed: why nodes have no report, by id.
    """
    best = max((each for each in reports if each), key=lambda each: len(each.topology.hosts), default=None)
    if best is None:
        return DoctorReport(
            findings=tuple(_of_cluster(ray_checks.check(nodes, failed, {}))), topology=ClusterTopology()
        )
    known = {host.rank for host in best.topology.hosts}
    findings, hosts = [*best.findings], [*best.topology.hosts]
    for report in reports:
        for host in report.topology.hosts if report else ():
            if report and host.rank not in known:
                known.add(host.rank)
                hosts.append(host)
                findings += [with_fields(each, host=each.host or compare.label(host)) for each in report.findings]
    findings = [with_fields(each, host=each.host or compare.label(hosts[0])) for each in findings]
    of_node: dict[str, HostTopology] = {present[host.rank].id: host for host in hosts}
    findings += _of_cluster(ray_checks.check(nodes, failed, of_node))
    return with_fields(
        best,
        findings=tuple(findings),
        topology=with_fields(best.topology, hosts=tuple(sorted(hosts, key=lambda host: host.rank))),
    )


def _of_cluster(findings: Sequence[Finding]) -> list[Finding]:
    return [with_fields(each, host=_CLUSTER) for each in findings]
