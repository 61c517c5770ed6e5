"""What NCCL's log (NCCL_DEBUG=INFO) says about the way of its tensors.

NCCL writes a line for each channel between two ranks: `Channel 00/0 : 0[0] -> 8[0] [send] via NET/IB/0/GDRDMA`, or
without `[send]` within a host: `... via P2P/CUMEM/read`, `... via SHM/direct/direct`. Before that it names the network:
`NET/IB : Using [0]mlx5_0:1/RoCE [RO]; OOB eth0:10.0.0.1<0>`, `Using network Socket`, `NET/IB : No device found.`
"""

import re
from collections import Counter
from dataclasses import dataclass, field

# Ways between hosts, the best first.
GDRDMA, IB, SOCKET = "GDRDMA", "IB", "Socket"
# Ways within a host.
P2P, SHM = "P2P", "SHM"
_BETWEEN_HOSTS = (GDRDMA, IB, SOCKET)

_CHANNEL = re.compile(r"NCCL INFO (?:Channel|Ring) \S+ : .*? via ([^\n]+?)(?: comm \S+.*)?$", re.MULTILINE)
_NETWORK = re.compile(r"NCCL INFO Using network ([^\n]+?)\s*$", re.MULTILINE)
_USING = re.compile(r"NCCL INFO NET/(IB\w*|Socket|OFI)\s*: Using ([^\n;]+)")
_DEVICES = re.compile(r"\[\d+\]([\w.-]+)")
_NO_RDMA = re.compile(r"NCCL INFO NET/IB : No device found")
_GDR_OFF = re.compile(r"GPU Direct RDMA Disabled for HCA \d+ '([^']+)'")
_WARNING = re.compile(r"NCCL WARN ([^\n]+)")
_DISABLED = re.compile(r"NCCL_IB_DISABLE set by environment to 1")


@dataclass(frozen=True, slots=True)
class NcclLog:
    """The facts in a log of NCCL. `ways`: the number of channels that go each way."""

    ways: Counter[str] = field(default_factory=Counter)
    network: str = ""  # that NCCL has chosen: Socket, IB, or the name of a plugin
    devices: tuple[str, ...] = ()  # interfaces or RDMA devices that it uses
    no_rdma: bool = False  # it has found no RDMA device
    rdma_disabled: bool = False  # NCCL_IB_DISABLE=1
    gdr_disabled: tuple[str, ...] = ()  # RDMA devices without GPUDirect RDMA
    warnings: tuple[str, ...] = ()

    @property
    def between_hosts(self) -> str:
        """The slowest way between hosts that some channel takes; "" if there are no such channels."""
        return next((way for way in reversed(_BETWEEN_HOSTS) if self.ways[way]), "")

    @property
    def path(self) -> str:
        """The ways of all channels, as one text: `P2P`, `P2P and SHM`, `GDRDMA`."""
        return " and ".join(sorted(self.ways))

    @property
    def reason(self) -> str:
        """The network in the log: its name, its devices, and the reason if there is no RDMA."""
        parts = [f"network {self.network}" + (f" on {', '.join(self.devices)}" if self.devices else "")]
        parts += ["no RDMA device found"] if self.no_rdma else []
        parts += ["NCCL_IB_DISABLE=1"] if self.rdma_disabled else []
        parts += [f"no GPUDirect on {', '.join(self.gdr_disabled)}"] if self.gdr_disabled and self.ways[IB] else []
        return "; ".join(parts) if self.network else ""


def classify(text: str) -> NcclLog:
    """Return what a log of NCCL says about ways, networks and devices."""
    networks = _NETWORK.findall(text)
    used = [name for _, names in _USING.findall(text) for name in _DEVICES.findall(names)]
    return NcclLog(
        ways=Counter(filter(None, map(way_of, _CHANNEL.findall(text)))),
        network=networks[-1] if networks else "",
        devices=tuple(dict.fromkeys(used)),
        no_rdma=_NO_RDMA.search(text) is not None,
        rdma_disabled=_DISABLED.search(text) is not None,
        gdr_disabled=tuple(dict.fromkeys(_GDR_OFF.findall(text))),
        warnings=tuple(dict.fromkeys(_WARNING.findall(text))),
    )


def way_of(via: str) -> str:
    """Return the class of what follows `via` in the line of a channel: `NET/IB/0/GDRDMA` -> GDRDMA."""
    parts = via.strip().split("/")
    if parts[0] == "NET":
        if any(part.startswith("GDRDMA") for part in parts[1:]):
            return GDRDMA
        return SOCKET if parts[1:2] == ["Socket"] else IB  # plugins (IBext_v8, AWS Libfabric) are RDMA too
    if parts[0].startswith("P2P") or parts[0].startswith("direct pointer"):
        return P2P
    if parts[0].startswith("SHM") or "shared memory" in via:
        return SHM
    return parts[0]
