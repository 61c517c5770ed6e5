"""The report for people: the findings by host, the topology as a tree, and the matrix of pairs of hosts."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from shoal.doctor.cores import short_list
from shoal.doctor.kinds import KINDS
from shoal.doctor.links import describe_links
from shoal.values import format_bytes
from shoal.wire.doctor import DoctorReport, Finding, LayoutFit
from shoal.wire.topology import ClusterTopology, Device, HostPair, HostTopology

_MARKS = {"ok": ("ok", "green"), "warning": ("warning", "yellow"), "failure": ("FAILURE", "bold red")}


def print_report(report: DoctorReport, console: Console) -> None:
    """Print the whole report."""
    hosts = list(dict.fromkeys(finding.host for finding in report.findings))
    for host in hosts:
        _print_findings(host, [each for each in report.findings if each.host == host], console)
    console.print(topology_tree(report.topology))
    if len(report.topology.hosts) > 1:
        console.print("latency in us, from row to column")
        console.print(pair_table(report.topology, "latency_us"))
        console.print("bandwidth, from row to column")
        console.print(pair_table(report.topology, "bandwidth"))
    if report.layouts:
        console.print("layouts of the model on this host")
        console.print(layout_table(report.layouts))
    if report.layouts_over_hosts:
        console.print("layouts of one replica over all hosts")
        console.print(layout_table(report.layouts_over_hosts))
    console.print(_summary(report.findings), soft_wrap=True)


def _print_findings(host: str, findings: Sequence[Finding], console: Console) -> None:
    if host:
        console.print(Text(host, style="bold"))
    for finding in findings:
        word, style = _MARKS[finding.level]
        line = Text.assemble((f"{word:8}", style), f"{KINDS[finding.kind].title}: {finding.text}")
        console.print(line, soft_wrap=True)
        if finding.mend:
            console.print(f"{'':8}mend: {finding.mend}", soft_wrap=True, markup=False)


def _summary(findings: Sequence[Finding]) -> Text:
    counts = {level: sum(each.level == level for each in findings) for level in ("ok", "warning", "failure")}
    style = _MARKS["failure" if counts["failure"] else "warning" if counts["warning"] else "ok"][1]
    words = [f"{counts['ok']} ok", _counted(counts["warning"], "warning"), _counted(counts["failure"], "failure")]
    return Text(", ".join(words), style=style)


def _counted(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def topology_tree(topology: ClusterTopology) -> Tree:
    """Return the hosts with their NUMA nodes, devices, links and interfaces."""
    tree = Tree("topology")
    for host in topology.hosts:
        _add_host(tree, host)
    return tree


def _add_host(tree: Tree, host: HostTopology) -> None:
    memory = f", {format_bytes(host.memory)}" if host.memory else ""
    address = f" ({host.address})" if host.address else ""
    branch = tree.add(escape(f"host {host.rank}: {host.name}{address}, {len(host.cores)} cores{memory}"))
    numbers = {node.number for node in host.numa}
    for node in host.numa:
        size = f", {format_bytes(node.memory)}" if node.memory else ""
        part = branch.add(f"NUMA node {node.number}: cores {short_list(node.cores)}{size}")
        _add_devices(part, [device for device in host.devices if device.numa == node.number])
    _add_devices(branch, [device for device in host.devices if device.numa not in numbers])
    if host.links:
        part = branch.add("links")
        for line in describe_links(host.links):
            part.add(escape(line))
    for interface in host.interfaces:
        if not interface.up or not interface.addresses:
            continue
        speed = f", {interface.speed * 8 / 1e9:g} Gbit/s" if interface.speed else ""
        rdma = f", RDMA device {interface.rdma}" if interface.rdma else ""
        chosen = ", used to reach other hosts" if interface.chosen else ""
        branch.add(escape(f"interface {interface.name}: {', '.join(interface.addresses)}{speed}{rdma}{chosen}"))
    for port in host.rdma:
        state = "active" if port.active else "not active"
        branch.add(escape(f"RDMA port {port.device}:{port.port}: {port.layer}, {state}"))
    for each in host.all_reduce:
        by = f" by {each.path}" if each.path else ""
        branch.add(
            escape(
                f"all-reduce with {each.backend} over {each.ranks} ranks{by}: {each.latency_us:.0f} us, "
                f"{format_bytes(each.bandwidth)}/s"
            )
        )


def _add_devices(branch: Tree, devices: Sequence[Device]) -> None:
    for device in devices:
        memory = f", {format_bytes(device.memory)}" if device.memory else ""
        hidden = "" if device.visible else ", hidden"
        branch.add(escape(f"GPU {device.index}: {device.name} {device.bus}{memory}{hidden}"))


def pair_table(topology: ClusterTopology, what: str) -> Table:
    """Return a matrix of all pairs: a row for each host that sends. `what`: latency_us or bandwidth."""
    table = Table()
    table.add_column("host")
    for host in topology.hosts:
        table.add_column(f"{host.rank}", justify="right")
    pairs = {(pair.source, pair.target): pair for pair in topology.pairs}
    for row in topology.hosts:
        cells = [_cell(pairs.get((row.rank, column.rank)), what) for column in topology.hosts]
        table.add_row(escape(f"{row.rank} {row.name}"), *cells)
    return table


def _cell(pair: HostPair | None, what: str) -> str:
    if pair is None:
        return "-"
    if pair.error:
        return "failed"
    if what == "latency_us":
        return "?" if pair.latency_us is None else f"{pair.latency_us:.0f}"
    return "?" if pair.bandwidth is None else f"{format_bytes(pair.bandwidth)}/s"


def layout_table(layouts: Sequence[LayoutFit]) -> Table:
    """Return a table of the layouts of a model."""
    table = Table()
    for heading in ("tensor parallel", "pipeline parallel", "fits", "weights per rank", "KV cache", "replicas"):
        table.add_column(heading, justify="right")
    for each in layouts:
        tokens = "measured" if each.kv_tokens is None else f"{each.kv_tokens} tokens"
        sizes = (str(each.tensor_parallel_size), str(each.pipeline_parallel_size))
        weights = format_bytes(each.weight_bytes) if each.weight_bytes is not None else ""
        table.add_row(
            *sizes, "yes" if each.fits else "no", weights, *((tokens, str(each.replicas)) if each.fits else ("", ""))
        )
    return table
