"""Links between the GPUs of this host, as the vendors' tools print them: NVLink, NVSwitch, PCIe, Infinity Fabric."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from shoal.devices import cpu
from shoal.doctor.kinds import failure, ok, warning
from shoal.doctor.tools import RunTool, run_tool
from shoal.wire.doctor import Finding
from shoal.wire.topology import Device, DeviceLink

TOPOLOGY = ("nvidia-smi", "topo", "-m")
NVLINKS = ("nvidia-smi", "nvlink", "--status")
QUERY = ("nvidia-smi", "-q")
ROCM_TOPOLOGY = ("rocm-smi", "--showtopo")
AMD_TOPOLOGY = ("amd-smi", "topology")
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")  # `nvidia-smi topo -m` underlines its heading
_FAR = {"SYS", "NODE", "PHB"}  # ways through the processor


@dataclass(frozen=True, slots=True)
class PcieLink:
    """The PCIe link of a GPU: the lanes and the transfers per second (GT/s) that it uses, and those that it could."""

    width: int
    most_width: int
    speed: float
    most_speed: float


@dataclass(frozen=True, slots=True)
class LinkFacts:
    """The links between GPUs. `active`: the NVLinks of each GPU, as bytes per second of each link."""

    links: tuple[DeviceLink, ...] = ()
    active: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    inactive: Mapping[int, int] = field(default_factory=dict)  # how many links of a GPU are inactive
    fabric: Mapping[int, str] = field(default_factory=dict)  # the state of NVSwitch for each GPU: "Completed"
    pcie: Mapping[int, PcieLink] = field(default_factory=dict)
    errors: tuple[str, ...] = ()


def gather(devices: Sequence[Device], run: RunTool = run_tool, root: Path = cpu.ROOT) -> LinkFacts:
    """Ask the vendor's tools for the links between the GPUs. `root` has the folder sys."""
    pcie = {each.index: link for each in devices if (link := read_pcie(root, each.bus)) is not None}
    if not devices:
        return LinkFacts()
    if devices[0].kind == "rocm":
        output = run(ROCM_TOPOLOGY)
        between = read_rocm(output.text)
        if output.missing:
            output = run(AMD_TOPOLOGY)
            between = read_amd(output.text)
        return LinkFacts(between, pcie=pcie, errors=(output.error,) if output.error and len(devices) > 1 else ())
    topology, links, details = (run(command) for command in (TOPOLOGY, NVLINKS, QUERY))
    active, inactive = read_nvlinks(links.text)
    found = mark_switched(read_topology(topology.text), active)
    # Hosts without NVLink, and old drivers, let the second command fail, which is no error.
    errors = (topology.error,) if topology.error and len(devices) > 1 else ()
    return LinkFacts(found, active, inactive, read_fabric(details.text), pcie, errors)


def read_topology(text: str) -> tuple[DeviceLink, ...]:
    """Read the matrix that `nvidia-smi topo -m` prints: a row and a column for each GPU, and some for NICs."""
    columns: list[str] = []
    found = []
    for line in _ESCAPES.sub("", text).splitlines():
        words = line.split()
        if not columns:
            columns = words if words[:1] == ["GPU0"] and (len(words) < 2 or words[1] != "X") else []
            continue
        if not words or not re.fullmatch(r"GPU\d+", words[0]):
            continue
        first = int(words[0][3:])
        for name, way in zip(columns, words[1:], strict=False):
            if re.fullmatch(r"GPU\d+", name) and int(name[3:]) > first and way != "X":
                found.append(_link(first, int(name[3:]), way))
    return tuple(found)


def _link(first: int, second: int, way: str) -> DeviceLink:
    count = re.fullmatch(r"NV(\d+)", way)
    if count:
        return DeviceLink(first=first, second=second, kind="nvlink", path=way, links=int(count[1]))
    kind: Literal["pcie", "unknown"] = "pcie" if way in {*_FAR, "PIX", "PXB"} else "unknown"
    return DeviceLink(first=first, second=second, kind=kind, path=way)


def read_nvlinks(text: str) -> tuple[dict[int, tuple[float, ...]], dict[int, int]]:
    """Read `nvidia-smi nvlink --status`. Return the speeds of each GPU's active links, and how many are inactive."""
    active: dict[int, list[float]] = {}
    inactive: dict[int, int] = {}
    gpu = -1
    for line in text.splitlines():
        if heading := re.match(r"GPU (\d+):", line):
            gpu = int(heading[1])
            active[gpu] = []
        elif speed := re.match(r"\s+Link \d+: ([\d.]+) GB/s", line):
            active.setdefault(gpu, []).append(float(speed[1]) * 1e9)
        elif re.match(r"\s+Link \d+: <?inactive", line, re.IGNORECASE):
            inactive[gpu] = inactive.get(gpu, 0) + 1
    return {number: tuple(speeds) for number, speeds in active.items()}, inactive


def mark_switched(links: Sequence[DeviceLink], active: Mapping[int, Sequence[float]]) -> tuple[DeviceLink, ...]:
    """Return the links with their speeds, and NVSwitch where there is one.

    Without a switch, a GPU shares its links out over the others. So if it has several neighbours, and all of its links
    lead to each of them, there is a switch between.
    """
    neighbours = Counter(gpu for link in links if link.links for gpu in (link.first, link.second))
    found = []
    for link in links:
        speeds = active.get(link.first, ())
        switched = neighbours[link.first] > 1 and link.links > 0 and link.links == len(speeds)
        each = speeds[0] if speeds else None
        found.append(
            DeviceLink(
                first=link.first,
                second=link.second,
                kind="nvswitch" if switched else link.kind,
                path=link.path,
                links=link.links,
                bandwidth=each * link.links if each and link.links else None,
            )
        )
    return tuple(found)


def read_fabric(text: str) -> dict[int, str]:
    """Read the state of the NVSwitch fabric for each GPU from `nvidia-smi -q`; GPUs without one are left out."""
    found: dict[int, str] = {}
    gpu, in_fabric = -1, False
    for line in text.splitlines():
        if line.startswith("GPU "):
            gpu, in_fabric = gpu + 1, False
        elif re.fullmatch(r"\s+Fabric", line):
            in_fabric = True
        elif in_fabric and (state := re.match(r"\s+State\s+: (.+)", line)):
            if state[1].strip() not in ("N/A", "Not Supported"):
                found[gpu] = state[1].strip()
        elif in_fabric and (status := re.match(r"\s+Status\s+: (.+)", line)):
            in_fabric = False
            if found.get(gpu) == "Completed" and status[1].strip() not in ("Success", "N/A"):
                found[gpu] = status[1].strip()
    return found


def read_rocm(text: str) -> tuple[DeviceLink, ...]:
    """Read the matrices that `rocm-smi --showtopo` prints: hops, and the type of the link of each pair."""
    tables: dict[str, dict[tuple[int, int], str]] = {}
    title = ""
    for line in text.splitlines():
        if heading := re.match(r"=+ (.+?) =+$", line.strip()):
            title = heading[1]
        elif row := re.match(r"GPU(\d+)\s+(\S.*)", line):
            for second, value in enumerate(row[2].split()):
                tables.setdefault(title, {})[int(row[1]), second] = value
    return _amd_links(tables.get("Link Type between two GPUs", {}), tables.get("Hops between two GPUs", {}))


def read_amd(text: str) -> tuple[DeviceLink, ...]:
    """Read the tables that `amd-smi topology` prints, whose rows and columns are addresses of the PCIe bus."""
    tables: dict[str, dict[tuple[int, int], str]] = {}
    title, row_number = "", 0
    for line in text.splitlines():
        if heading := re.match(r"\s*([A-Z ]+) TABLE:", line):
            title, row_number = heading[1], 0
        elif row := re.match(r"\s*[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.\d\s+(?![0-9a-f]{4}:)(\S.*)", line):
            for second, value in enumerate(row[1].split()):
                tables.setdefault(title, {})[row_number, second] = value
            row_number += 1
    return _amd_links(tables.get("LINK TYPE", {}), tables.get("HOPS", {}))


def _amd_links(types: Mapping[tuple[int, int], str], hops: Mapping[tuple[int, int], str]) -> tuple[DeviceLink, ...]:
    return tuple(
        DeviceLink(
            first=first,
            second=second,
            kind="infinity-fabric" if value == "XGMI" else "pcie" if value.startswith("PCI") else "unknown",
            path=value,
            links=1 if value == "XGMI" and hops.get((first, second)) == "1" else 0,
        )
        for (first, second), value in sorted(types.items())
        if second > first
    )


def read_pcie(root: Path, bus: str) -> PcieLink | None:
    """Return the PCIe link of a device, as /sys shows it."""
    folder = root / "sys/bus/pci/devices" / bus
    try:
        width, most_width, speed, most_speed = (
            float((folder / name).read_text().split()[0])
            for name in ("current_link_width", "max_link_width", "current_link_speed", "max_link_speed")
        )
    except (OSError, ValueError, IndexError):
        return None
    return PcieLink(int(width), int(most_width), speed, most_speed)


def check(facts: LinkFacts, devices: Sequence[Device]) -> list[Finding]:
    """Check the links between the visible GPUs."""
    visible = {device.index for device in devices if device.visible}
    links = [link for link in facts.links if {link.first, link.second} <= visible]
    found = [warning("check-failed", error) for error in facts.errors]
    return [*found, *_check_links(links), *_check_nvlinks(facts, visible), *_check_fabric(facts), *_check_pcie(facts)]


def _check_links(links: Sequence[DeviceLink]) -> list[Finding]:
    if not links:
        return []
    shown = "; ".join(describe_links(links))
    fast = [link for link in links if link.kind in ("nvlink", "nvswitch", "infinity-fabric")]
    far = [link for link in links if link.path in _FAR or link.kind == "pcie"]
    if fast and far:
        return [warning("device-links", f"not all GPUs have fast links: {shown}")]
    if any(link.path == "SYS" for link in links):
        return [warning("device-links", shown)]
    return [ok("device-links", shown)]


def describe_links(links: Sequence[DeviceLink]) -> list[str]:
    """Return a line for each kind of link, with the pairs of GPUs that have it."""
    ways: dict[str, list[DeviceLink]] = {}
    for link in links:
        ways.setdefault(f"{_TITLES[link.kind]} ({link.path})", []).append(link)
    return [f"{way}: {_pairs(each)}" for way, each in ways.items()]


_TITLES = {
    "nvlink": "NVLink",
    "nvswitch": "NVSwitch",
    "infinity-fabric": "Infinity Fabric",
    "pcie": "PCIe",
    "unknown": "unknown",
}
_SHOWN_PAIRS = 6


def _pairs(links: Sequence[DeviceLink]) -> str:
    shown = ", ".join(f"{link.first}-{link.second}" for link in links[:_SHOWN_PAIRS])
    return f"{shown} and {len(links) - _SHOWN_PAIRS} more" if len(links) > _SHOWN_PAIRS else shown


def _check_nvlinks(facts: LinkFacts, visible: set[int]) -> list[Finding]:
    down = {gpu: count for gpu, count in facts.inactive.items() if gpu in visible and facts.active.get(gpu)}
    counts = {gpu: len(speeds) for gpu, speeds in facts.active.items() if gpu in visible}
    if down:
        shown = ", ".join(f"{count} of GPU {gpu}" for gpu, count in down.items())
        return [warning("link-down", f"inactive NVLinks: {shown}")]
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"GPU {gpu}: {count}" for gpu, count in counts.items())
        return [warning("link-down", f"the GPUs have different numbers of active NVLinks ({shown})")]
    return [ok("link-down", f"{max(counts.values())} active NVLinks on each GPU")] if any(counts.values()) else []


def _check_fabric(facts: LinkFacts) -> list[Finding]:
    wrong = {gpu: state for gpu, state in facts.fabric.items() if state != "Completed"}
    if wrong:
        shown = ", ".join(f"GPU {gpu}: {state}" for gpu, state in wrong.items())
        return [failure("fabric", f"the NVSwitch fabric is not ready ({shown})")]
    return [ok("fabric", "the NVSwitch fabric is ready")] if facts.fabric else []


def _check_pcie(facts: LinkFacts) -> list[Finding]:
    # An idle GPU lowers the speed of its link, but not its width.
    narrow = {gpu: link for gpu, link in facts.pcie.items() if link.width < link.most_width}
    if narrow:
        shown = ", ".join(f"GPU {gpu}: {link.width} of {link.most_width} lanes" for gpu, link in narrow.items())
        return [warning("pcie", f"fewer PCIe lanes than possible ({shown})")]
    if not facts.pcie:
        return []
    best = max(facts.pcie.values(), key=lambda link: link.most_speed * link.most_width)
    return [ok("pcie", f"{best.most_width} lanes of {best.most_speed:g} GT/s")]
