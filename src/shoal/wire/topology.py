"""The measured topology of a cluster: what `shoal doctor --output FILE` writes, for planners and for other programs.

The file is JSON. The names of the fields are the keys, at all levels. Sizes are in bytes, speeds in bytes per second
and latencies in microseconds; null and empty texts mean that a value is not known. Fields may be added without a new
version: readers ignore those that they do not know. `TOPOLOGY_VERSION` is raised when a field gets another meaning.
"""

from typing import Any, Literal, TypeVar

import msgspec

from shoal.errors import ConfigError

TOPOLOGY_VERSION = 1


class Document(msgspec.Struct, frozen=True, kw_only=True):
    """The base class of objects with named fields: those that are stored, or sent to programs of other versions."""


class NumaNode(Document, frozen=True):
    """A part of a host's memory, and the cores that are near it."""

    number: int
    cores: tuple[int, ...] = ()
    memory: int | None = None
    distances: tuple[int, ...] = ()  # to the nodes of this host in their order, as the firmware states them


class Device(Document, frozen=True):
    """An accelerator of a host."""

    index: int  # as the vendor's tool numbers it
    kind: Literal["cuda", "rocm"] = "cuda"
    name: str = ""
    uuid: str = ""
    bus: str = ""  # its address on the PCIe bus, such as 0000:1b:00.0
    memory: int | None = None
    numa: int | None = None
    visible: bool = True  # False: a variable such as CUDA_VISIBLE_DEVICES hides it


class DeviceLink(Document, frozen=True):
    """The way between two accelerators of a host; the same in both directions."""

    first: int
    second: int
    kind: Literal["nvlink", "nvswitch", "infinity-fabric", "pcie", "unknown"]
    path: str = ""  # as the vendor's tool names it: NV18, PIX, SYS, XGMI
    links: int = 0  # how many NVLink or Infinity Fabric links
    bandwidth: float | None = None  # in one direction, as the vendor states it


class Interface(Document, frozen=True):
    """A network interface of a host."""

    name: str
    addresses: tuple[str, ...] = ()
    up: bool = True
    physical: bool = False
    mtu: int | None = None
    speed: float | None = None
    rdma: str = ""  # the RDMA device on this interface, such as mlx5_0
    chosen: bool = False  # connections to other hosts use this interface


class RdmaPort(Document, frozen=True):
    """A port of an RDMA device."""

    device: str
    port: int
    layer: str = ""  # InfiniBand or Ethernet (RoCE)
    active: bool = False
    speed: float | None = None


class AllReduceSpeed(Document, frozen=True):
    """The measured speed of an all-reduce. `bandwidth`: bytes that each rank sends per second ("bus bandwidth")."""

    backend: str
    ranks: int
    latency_us: float
    bandwidth: float
    path: str = ""  # what NCCL's log names: P2P, SHM, Socket, IB, GDRDMA


class HostTopology(Document, frozen=True):
    """One host."""

    name: str
    rank: int = 0  # its --node-rank
    address: str = ""  # at which the other hosts reach it
    machine: str = ""  # the same for containers of one machine
    cores: tuple[int, ...] = ()  # those that Shoal may use
    memory: int | None = None
    numa: tuple[NumaNode, ...] = ()
    devices: tuple[Device, ...] = ()
    links: tuple[DeviceLink, ...] = ()
    interfaces: tuple[Interface, ...] = ()
    rdma: tuple[RdmaPort, ...] = ()
    all_reduce: tuple[AllReduceSpeed, ...] = ()  # between ranks of this host


class HostPair(Document, frozen=True):
    """A measured connection from one host to another. It is one TCP connection, even if there is RDMA."""

    source: int  # the rank of the host that sends
    target: int
    latency_us: float | None = None  # half of the time of a round trip
    bandwidth: float | None = None
    clock_offset_s: float | None = None  # the target's clock minus the source's
    error: str = ""  # why nothing was measured


class PairAddress(Document, frozen=True):
    """The address at which a host waits for the others that measure the connection to it."""

    address: str
    port: int
    token: str  # a secret that only the hosts that measure together know


class ClusterTopology(Document, frozen=True):
    """All hosts, and what was measured between them."""

    version: int = TOPOLOGY_VERSION
    shoal: str = ""  # the version of Shoal that wrote it
    hosts: tuple[HostTopology, ...] = ()
    pairs: tuple[HostPair, ...] = ()
    all_reduce: tuple[AllReduceSpeed, ...] = ()  # over all hosts, with one rank on each
    path: str = ""  # how NCCL sends between hosts: Socket, IB, GDRDMA; empty if it was not tried


_encoder = msgspec.json.Encoder()

D = TypeVar("D", bound=Document)


def encode_document(document: Document) -> bytes:
    """Return a document as one line of JSON."""
    return _encoder.encode(document)


def pretty_document(document: Document) -> str:
    """Return a document as JSON for people."""
    return msgspec.json.format(_encoder.encode(document), indent=2).decode()


def with_fields(document: D, **changes: Any) -> D:
    """Return a copy of a document with some fields changed."""
    return msgspec.structs.replace(document, **changes)


def as_objects(document: Document) -> dict[str, Any]:
    """Return a document as dictionaries and lists."""
    found: dict[str, Any] = msgspec.to_builtins(document)
    return found


def decode_document(kind: type[D], data: bytes) -> D:
    """Return a document from JSON.

    Raises:
        ConfigError: it is something else.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"this is no {kind.__name__} of Shoal: {error}") from None


def read_topology(data: bytes) -> ClusterTopology:
    """Return the topology in the content of a file that `shoal doctor --output FILE` has written.

    Raises:
        ConfigError: it is something else, or has a newer version.
    """
    found = decode_document(ClusterTopology, data)
    if found.version > TOPOLOGY_VERSION:
        raise ConfigError(
            f"the topology has version {found.version}, and this Shoal reads version {TOPOLOGY_VERSION} and older: "
            "write it again with `shoal doctor --output`, or update Shoal"
        )
    return found
