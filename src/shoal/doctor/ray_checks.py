"""What is particular to a Ray cluster: its nodes, their addresses, and the resources that Ray counts on them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from shoal.doctor.kinds import failure, ok, warning
from shoal.wire.doctor import Finding
from shoal.wire.topology import HostTopology


@dataclass(frozen=True, slots=True)
class RayNode:
    """A node as Ray knows it."""

    id: str
    address: str
    resources: Mapping[str, float] = field(default_factory=dict)
    dead: str = ""  # why it is dead; empty if it is alive

    def __str__(self) -> str:
        return f"{self.address} ({self.id[:8]})"


def check(nodes: Sequence[RayNode], failed: Mapping[str, str], hosts: Mapping[str, HostTopology]) -> list[Finding]:
    """Return all findings.

    Args:
        nodes: those of the cluster, dead ones too.
        failed: why nodes could not be examined, by id.
        hosts: what the doctors have found, by the node's id.
    """
    pairs = [(node, hosts[node.id]) for node in nodes if node.id in hosts]
    return [*check_nodes(nodes, failed), *check_addresses(pairs), *check_resources(pairs)]


def check_nodes(nodes: Sequence[RayNode], failed: Mapping[str, str]) -> list[Finding]:
    """Check that all nodes are alive, and that the doctor could run on them."""
    found = [
        failure("ray-nodes", f"the doctor did not run on {node}: {failed[node.id]}")
        for node in nodes
        if node.id in failed
    ]
    alive = {node.address for node in nodes if not node.dead}
    for node in nodes:
        if node.dead and node.address in alive:
            found.append(ok("ray-nodes", f"{node} is dead, and another node has its address: {node.dead}"))
        elif node.dead:
            found.append(warning("ray-nodes", f"{node} is dead: {node.dead}"))
    count = len(alive)
    return found or [ok("ray-nodes", f"{count} node{'' if count == 1 else 's'} of the cluster, all alive")]


def check_addresses(pairs: Sequence[tuple[RayNode, HostTopology]]) -> list[Finding]:
    """Check that Ray's address of each node is one of its own, and the one at which the other hosts reach it."""
    found = []
    for node, host in pairs:
        names = {address: each.name for each in host.interfaces for address in each.addresses}
        if names and node.address not in names:
            there = ", ".join(f"{address} ({name})" for address, name in names.items())
            found.append(
                warning(
                    "ray-address", f"Ray knows {host.name} as {node.address}, which it does not have: it has {there}"
                )
            )
        elif host.address and node.address != host.address:
            found.append(
                warning(
                    "ray-address",
                    f"Ray knows {host.name} as {node.address} ({names.get(node.address, 'unknown interface')}), and "
                    f"connections between ranks use {host.address} ({names.get(host.address, 'unknown interface')})",
                )
            )
    return found or [ok("ray-address", "Ray uses the same addresses as the ranks")]


def check_resources(pairs: Sequence[tuple[RayNode, HostTopology]]) -> list[Finding]:
    """Compare the GPUs and CPUs that Ray counts with those that were found."""
    found = []
    for node, host in pairs:
        named = f"{host.name} ({node.address})"
        gpus, counted = sum(device.visible for device in host.devices), node.resources.get("GPU", 0.0)
        if counted > gpus:
            found.append(failure("ray-resources", f"Ray counts {counted:g} GPU on {named}, which has {gpus}"))
        elif counted < gpus:
            found.append(
                warning("ray-resources", f"Ray counts {counted:g} GPU on {named}, which has {gpus}: others stay idle")
            )
        cores, counted = len(host.cores), node.resources.get("CPU", 0.0)
        if cores and counted > cores:
            found.append(
                warning(
                    "ray-resources",
                    f"Ray counts {counted:g} CPU on {named}, which may use {cores} cores: ranks would share them",
                )
            )
    if found:
        return found
    listed = ", ".join(f"{host.name}: {_listed(node.resources)}" for node, host in pairs)
    return [ok("ray-resources", f"what Ray counts is there ({listed})")]


def _listed(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{resources.get(name, 0.0):g} {name}" for name in ("CPU", "GPU"))
