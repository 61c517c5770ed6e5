"""Network interfaces and RDMA devices: which there are, and which connections to other hosts would use."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from shoal.addresses import address_towards
from shoal.devices import cpu, network
from shoal.doctor.kinds import failure, ok, warning
from shoal.wire.doctor import Finding
from shoal.wire.topology import Interface, RdmaPort

NET, RDMA = Path("sys/class/net"), Path("sys/class/infiniband")
_ANYWHERE = "192.0.2.1"  # of a documentation network (RFC 5737): nothing is sent to it, only the route is asked for
_SLOW = 1e9 / 8  # an interface of at most 1 Gbit/s
_HOST_ADDRESS = ("SHOAL_HOST_IP", "VLLM_HOST_IP")
_VARIABLES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


@dataclass(frozen=True, slots=True)
class NetworkFacts:
    """The interfaces of this host. `target`: the address for which the chosen interface was asked; "" for any."""

    interfaces: tuple[Interface, ...] = ()
    rdma: tuple[RdmaPort, ...] = ()
    target: str = ""

    @property
    def chosen(self) -> Interface | None:
        return next((each for each in self.interfaces if each.chosen), None)


def gather(target: str = "", root: Path = cpu.ROOT, addresses: Mapping[str, list[str]] | None = None) -> NetworkFacts:
    """Return the interfaces. `root` has the folder sys; `addresses`: by interface, None: those of this host."""
    found = interface_addresses() if addresses is None else addresses
    source = source_address(target)
    rdma_of = dict(_rdma_interfaces(root))
    interfaces = [
        _interface(folder, found.get(folder.name, []), rdma_of.get(folder.name, ""), source)
        for folder in sorted((root / NET).glob("*"))
        if folder.is_dir()
    ]
    return NetworkFacts(tuple(interfaces), tuple(_rdma_ports(root)), target)


def _interface(folder: Path, addresses: list[str], rdma: str, source: str) -> Interface:
    speed, mtu = _number(folder / "speed"), _number(folder / "mtu")
    return Interface(
        name=folder.name,
        addresses=tuple(addresses),
        up=_text(folder / "carrier") == "1",  # can't be read if it is switched off; `operstate` changes seconds later
        physical=(folder / "device").exists(),
        mtu=mtu,
        speed=speed * 1e6 / 8 if speed and speed > 0 else None,
        rdma=rdma,
        chosen=bool(source) and source in addresses,
    )


def source_address(target: str = "") -> str:
    """Return the address of this host from which a connection to `target` would come; "" if there is no way to it."""
    return address_towards(target or _ANYWHERE)


def _rdma_interfaces(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (interface, RDMA device)."""
    for device in (root / RDMA).glob("*"):
        for interface in (device / "device/net").glob("*"):
            yield interface.name, device.name


def _rdma_ports(root: Path) -> Iterator[RdmaPort]:
    for folder in sorted((root / RDMA).glob("*/ports/*")):
        rate = re.match(r"[\d.]+", _text(folder / "rate"))  # "400 Gb/sec (4X NDR)"
        yield RdmaPort(
            device=folder.parent.parent.name,
            port=int(folder.name) if folder.name.isdigit() else 1,
            layer=_text(folder / "link_layer"),
            active="ACTIVE" in _text(folder / "state"),  # "4: ACTIVE"
            speed=float(rate[0]) * 1e9 / 8 if rate else None,
        )


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except (OSError, ValueError):  # reading `speed` of a virtual interface fails
        return ""


def _number(file: Path) -> int | None:
    text = _text(file)
    return int(text) if text.lstrip("-").isdigit() else None


def interface_addresses() -> dict[str, list[str]]:
    """Return the addresses of each interface, IPv4 first.

    Raises:
        OSError: the operating system does not list them.
    """
    found: dict[str, list[str]] = {}
    for address, name in network.interfaces().items():
        found.setdefault(name, []).append(address.partition("%")[0])
    return {name: sorted(addresses, key=lambda text: ":" in text) for name, addresses in found.items()}


def check(facts: NetworkFacts, variables: Mapping[str, str], *, several_hosts: bool) -> list[Finding]:
    """Check the interfaces. `several_hosts`: this host must reach others, so that it needs one."""
    others = [each for each in facts.interfaces if each.name != "lo"]
    usable = [each for each in others if each.up and each.addresses]
    found = [*check_host_address(facts, variables), *check_variables(facts, variables)]
    if not usable:
        text = f"no interface but lo is up and has an address ({', '.join(each.name for each in others) or 'none'})"
        return [(failure if several_hosts else warning)("interfaces", text), *found]
    shown = ", ".join(f"{each.name} {each.addresses[0]}{_speed(each.speed)}" for each in usable)
    return [ok("interfaces", shown), *check_chosen(facts, several_hosts=several_hosts), *found, *check_rdma(facts)]


def check_chosen(facts: NetworkFacts, *, several_hosts: bool) -> list[Finding]:
    """Check the interface that connections to other hosts would use."""
    own = any(facts.target in each.addresses for each in facts.interfaces)
    chosen, towards = facts.chosen, f"to {facts.target} " if facts.target and not own else ""
    if chosen is None:
        level = failure if several_hosts else warning
        return [level("chosen-interface", f"no interface leads {towards or 'to other hosts '}".rstrip())]
    text = f"connections {towards}use {chosen.name}{_speed(chosen.speed)}"
    faster = [each for each in facts.interfaces if each.up and (each.speed or 0) > 2 * (chosen.speed or 1e18)]
    if several_hosts and faster:
        return [warning("chosen-interface", f"{text}, but {faster[0].name} has {_speed(faster[0].speed).strip(' ()')}")]
    if several_hosts and chosen.speed is not None and chosen.speed <= _SLOW:
        return [warning("chosen-interface", f"{text}: too slow for tensor parallelism over hosts")]
    return [ok("chosen-interface", text)]


def check_host_address(facts: NetworkFacts, variables: Mapping[str, str]) -> list[Finding]:
    """Check that the address that a variable names for this host is one of its addresses."""
    name = next((each for each in _HOST_ADDRESS if variables.get(each)), "")
    if not name:
        return []
    address = variables[name]
    of = next((each for each in facts.interfaces if address in each.addresses), None)
    if of is None:
        known = ", ".join(text for each in facts.interfaces if each.name != "lo" for text in each.addresses)
        return [failure("host-address", f"{name}={address} is none of the addresses of this host: {known or 'none'}")]
    if not of.up:
        return [failure("host-address", f"{name}={address}: {of.name} is down")]
    return [ok("host-address", f"{name}={address} is the address of {of.name}")]


def check_variables(facts: NetworkFacts, variables: Mapping[str, str]) -> list[Finding]:
    """Check that the interfaces that variables name are there and up."""
    found = []
    for name in _VARIABLES:
        value = variables.get(name, "")
        if not value:
            continue
        using = [each for each in facts.interfaces if _matches(value, each.name, prefixes=name.startswith("NCCL"))]
        if not using:
            names = ", ".join(each.name for each in facts.interfaces)
            found.append(failure("interface-variables", f"{name}={value} names none of {names}"))
        elif not any(each.up for each in using):
            found.append(failure("interface-variables", f"{name}={value}: {using[0].name} is down"))
        else:
            found.append(ok("interface-variables", f"{name}={value} means {', '.join(each.name for each in using)}"))
    return found


def _matches(value: str, interface: str, *, prefixes: bool) -> bool:
    """Tell whether a variable names an interface.

    NCCL takes beginnings of names; `=name` means a whole name, and `^` all but these.
    """
    if not prefixes:
        return interface in value.split(",")
    exclude, value = value.startswith("^"), value.removeprefix("^")
    exact, value = value.startswith("="), value.removeprefix("=")
    hit = any(interface == each if exact else interface.startswith(each) for each in value.split(",") if each)
    return hit is not exclude


def check_rdma(facts: NetworkFacts) -> list[Finding]:
    """Check that the ports of RDMA devices are active."""
    if not facts.rdma:
        return []
    down = [f"{port.device}:{port.port}" for port in facts.rdma if not port.active]
    active = [f"{each.device}:{each.port} {each.layer}{_speed(each.speed)}" for each in facts.rdma if each.active]
    if not active:
        return [warning("rdma", f"no port of an RDMA device is active: {', '.join(down)}")]
    if down:
        return [warning("rdma", f"active: {', '.join(active)}; not active: {', '.join(down)}")]
    return [ok("rdma", ", ".join(active))]


def _speed(speed: float | None) -> str:
    return "" if speed is None else f" ({speed * 8 / 1e9:g} Gbit/s)"
