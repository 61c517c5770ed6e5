"""What hosts must have in common, and what was measured between them. All hosts draw the same conclusions."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from shoal.doctor.kinds import failure, ok, warning
from shoal.doctor.nccl_log import GDRDMA, IB, SOCKET
from shoal.values import format_bytes
from shoal.wire.doctor import Finding, HostExamination
from shoal.wire.topology import AllReduceSpeed, HostPair, HostTopology, Interface, with_fields

_SERIOUS = {"Shoal", "wire version"}  # hosts with different ones do not work together
_OWN = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "SHOAL_DP_RANK", "VLLM_DP_RANK",
        "SHOAL_CLUSTER", "VLLM_HOST_IP", "NCCL_HOSTID")  # fmt: skip # a host may have its own value
_SKEW_S, _GREAT_SKEW_S = 0.5, 30.0
_SLOW_SHARE = 0.5  # of the median: a pair below it stands out
_LINE_SHARE, _MOST_OF_ONE = 0.3, 1.25e9  # of the interface's speed, of which one connection fills 10 Gbit/s at most
_BRIDGES = ("docker", "br-", "virbr", "cni", "flannel", "podman", "lxc", "lxd", "veth", "cali")

Examinations = Sequence[HostExamination]  # by rank, without the hosts that did not answer


def label(host: HostTopology) -> str:
    return f"host {host.rank} ({host.name})"


def check(examinations: Examinations, pairs: Sequence[HostPair], speeds: Sequence[AllReduceSpeed]) -> list[Finding]:
    """Return all findings about several hosts."""
    hosts = [each.topology for each in examinations]
    return [
        *check_addresses(hosts),
        *check_versions(examinations),
        *check_variables(examinations),
        *check_models(examinations),
        *check_devices(hosts),
        *check_mtu(hosts),
        *check_connections(hosts, pairs),
        *check_clocks(hosts, pairs),
        *check_transport(hosts, speeds),
    ]


def check_arrived(present: Iterable[int], expected: Iterable[int], what: str) -> list[Finding]:
    """Check that all expected hosts have sent something. `what`: the name of that."""
    ranks = sorted(expected)
    missing = sorted(set(ranks) - set(present))
    if missing:
        which = ", ".join(map(str, missing))
        return [failure("hosts", f"no {what} from --node-rank {which}: it has ended, or takes too long")]
    return [ok("hosts", f"{len(ranks)} hosts have sent their {what}")]


def check_addresses(hosts: Sequence[HostTopology]) -> list[Finding]:
    """Check that no address is on two hosts. Bridges of container engines have the same one everywhere."""
    holders: dict[str, list[HostTopology]] = defaultdict(list)
    for host in hosts:
        for address in sorted({a for each in host.interfaces if not _is_bridge(each) for a in each.addresses}):
            if not address.startswith(("127.", "fe80:")) and address != "::1":
                holders[address].append(host)
    found = []
    for address, twice in holders.items():
        if len(twice) > 1:
            who = " and ".join(map(label, twice))
            same = len({host.machine for host in twice}) == 1 and twice[0].machine
            why = "they are the same machine" if same else "packets go to only one of them"
            used = any(host.address == address for host in twice)
            found.append((failure if used else warning)("double-address", f"{who} both have {address}: {why}"))
    names: dict[str, list[HostTopology]] = defaultdict(list)
    for host in hosts:
        names[host.name].append(host)
    doubles = [f"{len(each)} hosts are called {name}" for name, each in names.items() if len(each) > 1]
    if doubles and not found:
        found.append(warning("double-address", "; ".join(doubles), "hostnamectl set-hostname NAME on one of them"))
    return found or [ok("double-address", "every host has addresses of its own")]


def _is_bridge(interface: Interface) -> bool:
    return interface.name.startswith(_BRIDGES)


def check_versions(examinations: Examinations) -> list[Finding]:
    different = _differences(examinations, lambda each: each.versions)
    if not different:
        return [ok("versions", "all hosts have the same versions")]
    found = []
    for name, values in different.items():
        level = failure if name in _SERIOUS else warning
        found.append(level("versions", f"{name}: {values}"))
    return found


def check_variables(examinations: Examinations) -> list[Finding]:
    def comparable(each: HostExamination) -> Mapping[str, str]:
        return {name: value for name, value in each.variables.items() if not name.startswith(_OWN)}

    different = _differences(examinations, comparable)
    found = [warning("variables-differ", f"{name}: {values}") for name, values in different.items()]
    return found or [ok("variables-differ", "all hosts have the same variables for communication")]


def check_models(examinations: Examinations) -> list[Finding]:
    """Compare the digests of the model's files. Hosts where the model cannot be read have a finding of their own."""
    readable = [each for each in examinations if each.model]
    if len(readable) < 2:
        return []
    different = _differences(readable, lambda each: each.model)
    found = [failure("model-files", f"{name}: {values}") for name, values in different.items()]
    return found or [ok("model-files", "all hosts have the same files of the model")]


def _differences(examinations: Examinations, of: Callable[[HostExamination], Mapping[str, str]]) -> dict[str, str]:
    """Return what differs, as name -> who has which value."""
    names = sorted({name for each in examinations for name in of(each)})
    found = {}
    for name in names:
        holders: dict[str, list[str]] = defaultdict(list)
        for each in examinations:
            holders[of(each).get(name, "none")].append(label(each.topology))
        if len(holders) > 1:
            found[name] = "; ".join(f"{value} on {', '.join(who)}" for value, who in holders.items())
    return found


def check_devices(hosts: Sequence[HostTopology]) -> list[Finding]:
    groups: dict[str, list[str]] = defaultdict(list)
    for host in hosts:
        visible = [device for device in host.devices if device.visible]
        counts = {name: sum(each.name == name for each in visible) for name in dict.fromkeys(d.name for d in visible)}
        devices = ", ".join(f"{count} x {name}" for name, count in counts.items()) or f"{len(host.cores)} cores"
        groups[devices].append(label(host))
    if len(groups) > 1:
        text = "; ".join(f"{devices} on {', '.join(who)}" for devices, who in groups.items())
        return [warning("devices-differ", text)]
    return [ok("devices-differ", f"{next(iter(groups), 'nothing')} on each host")]


def check_mtu(hosts: Sequence[HostTopology]) -> list[Finding]:
    """Compare the MTUs of the interfaces over which the hosts reach each other."""
    used = {label(host): each for host in hosts for each in host.interfaces if host.address in each.addresses}
    if len({each.mtu for each in used.values()}) > 1:
        text = ", ".join(f"{each.mtu} on {each.name} of {who}" for who, each in used.items())
        return [warning("mtu", text)]
    mtu = next((each.mtu for each in used.values()), None)
    return [ok("mtu", f"{mtu} on all hosts")] if mtu else []


def check_connections(hosts: Sequence[HostTopology], pairs: Sequence[HostPair]) -> list[Finding]:
    """Check that every pair is connected, and name the slowest."""
    names = {host.rank: label(host) for host in hosts}
    found = [failure("connection", f"{_names(pair, names)}: {pair.error}") for pair in pairs if pair.error]
    measured = [pair for pair in pairs if pair.bandwidth is not None and pair.latency_us is not None]
    if not measured:
        return found
    if not found:
        found.append(ok("connection", f"pairs of hosts that are connected: {len(measured) // 2}"))
    slowest = min(measured, key=lambda pair: pair.bandwidth or 0.0)
    farthest = max(measured, key=lambda pair: pair.latency_us or 0.0)
    text = (
        f"least bandwidth: {_names(slowest, names)}, {format_bytes(slowest.bandwidth or 0)}/s; greatest latency: "
        f"{_names(farthest, names)}, {farthest.latency_us:.0f} us"
    )
    return [*found, _check_slowest(slowest, measured, hosts, text)]


def _check_slowest(
    slowest: HostPair, measured: Sequence[HostPair], hosts: Sequence[HostTopology], text: str
) -> Finding:
    bandwidth = slowest.bandwidth or 0.0
    median = statistics.median(pair.bandwidth or 0.0 for pair in measured)
    if bandwidth < _SLOW_SHARE * median:
        return warning("slow-pair", f"{text}; the median bandwidth is {format_bytes(median)}/s")
    ends = [host for host in hosts if host.rank in (slowest.source, slowest.target)]
    lines = [each.speed for host in ends for each in host.interfaces if host.address in each.addresses and each.speed]
    line = min(lines, default=0.0)
    if bandwidth < _LINE_SHARE * min(line, _MOST_OF_ONE):
        return warning("slow-pair", f"{text}; the interface has {line * 8 / 1e9:g} Gbit/s")
    return ok("slow-pair", text)


def _names(pair: HostPair, names: Mapping[int, str]) -> str:
    return f"{names.get(pair.source, pair.source)} to {names.get(pair.target, pair.target)}"


def slowest_speeds(measured: Iterable[AllReduceSpeed]) -> tuple[AllReduceSpeed, ...]:
    """Return one speed for each backend: that of the slowest host, and all ways that some host has seen."""
    groups: dict[str, list[AllReduceSpeed]] = defaultdict(list)
    for speed in measured:
        groups[speed.backend].append(speed)
    return tuple(
        with_fields(
            group[0],
            latency_us=max(each.latency_us for each in group),
            bandwidth=min(each.bandwidth for each in group),
            path=" and ".join(sorted({way for each in group for way in each.path.split(" and ") if way})),
        )
        for _, group in sorted(groups.items())
    )


def check_clocks(hosts: Sequence[HostTopology], pairs: Sequence[HostPair]) -> list[Finding]:
    """Check how much the clocks differ from that of the host with rank 0."""
    offsets = {
        pair.target: pair.clock_offset_s for pair in pairs if pair.source == 0 and pair.clock_offset_s is not None
    }
    if not offsets:
        return []
    names = {host.rank: label(host) for host in hosts}
    rank = max(offsets, key=lambda each: abs(offsets[each] or 0.0))
    skew = offsets[rank] or 0.0
    amount = f"{abs(skew):.1f} s" if abs(skew) >= 1 else f"{abs(skew) * 1e3:.2f} ms"
    text = f"the clock of {names.get(rank, rank)} is {amount} {'ahead of' if skew > 0 else 'behind'} that of host 0"
    if abs(skew) > _GREAT_SKEW_S:
        return [failure("clock-skew", text)]
    return [warning("clock-skew", text)] if abs(skew) > _SKEW_S else [ok("clock-skew", text)]


def check_transport(hosts: Sequence[HostTopology], speeds: Sequence[AllReduceSpeed]) -> list[Finding]:
    """Check how tensors travel between the hosts: over plain sockets or RDMA."""
    path = next((speed.path for speed in speeds if speed.backend == "nccl"), "")
    rdma = [label(host) for host in hosts if any(port.active for port in host.rdma)]
    if not path:
        some = f"; {', '.join(rdma)} have RDMA, which NCCL uses between GPUs" if rdma else ""
        return [ok("transport", f"plain sockets: NCCL was not tried, since not every host has a GPU{some}")]
    if SOCKET in path:
        if len(rdma) == len(hosts):
            return [warning("transport", "NCCL uses plain sockets, although every host has an active RDMA port")]
        return [ok("transport", "NCCL uses plain sockets: not every host has an active RDMA port")]
    if IB in path and GDRDMA not in path:
        return [
            warning("transport", "NCCL uses RDMA, but without GPUDirect: tensors are copied through the host's memory")
        ]
    return [ok("transport", f"NCCL uses {path}")]
