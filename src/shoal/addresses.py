"""Hosts and ports: parsed from options, resolved for sockets, and formatted for messages."""

import errno
import ipaddress
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from shoal.errors import ConfigError

BACKLOG = 1024


@dataclass(frozen=True, slots=True)
class Address:
    host: str  # a name, or an address without brackets
    port: int

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Parse `host:port`. An IPv6 address must be in brackets: `[fd02::1]:29550`.

        Raises:
            ConfigError: the text has another form.
        """
        host, _, port = text.rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        if not host.strip("[]") or (":" in host and not bracketed) or not (port.isascii() and port.isdigit()):
            raise ConfigError(f"a rendezvous must be HOST:PORT or [IPV6]:PORT, got {text!r}")
        if not 0 < int(port) < 65536:
            raise ConfigError(f"a rendezvous must be HOST:PORT with a port from 1 to 65535, got {text!r}")
        return cls(parse_host(host, "a rendezvous"), int(port))

    def __str__(self) -> str:
        return join_host_port(self.host, self.port)


def parse_host(text: str, name: str) -> str:
    """Parse the value of an option that is a host without a port. Brackets around an IPv6 address are removed.

    Raises:
        ConfigError: there is a port, or it is no address. The message calls the option `name`.
    """
    host = text.strip()
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    if not host or (":" in host and _literal(host) is None):
        raise ConfigError(f"{name} must be the name or the address of a host, without a port, got {text!r}")
    return host


def bracketed(host: str) -> str:
    """Return a host as in a URL: with brackets around an IPv6 address."""
    return f"[{host}]" if isinstance(_literal(host), ipaddress.IPv6Address) else host


def join_host_port(host: str, port: int) -> str:
    """Return `host:port`, with brackets around an IPv6 address."""
    return f"{bracketed(host)}:{port}"


Endpoint = tuple[socket.AddressFamily, tuple[Any, ...]]  # the arguments of a socket


def resolve(host: str, port: int = 0, *, passive: bool = False) -> list[Endpoint]:
    """Return the addresses of a host, for sockets.

    IPv4 addresses come first on every host, so that all processes with the same name use the same kind of address.
    `passive`: for sockets that listen; then "" means all addresses of this host.

    Raises:
        OSError: the name is unknown.
    """
    flags = socket.AI_PASSIVE if passive else 0
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=flags)
    ordered = sorted(found, key=lambda each: each[0] != socket.AF_INET)
    return list(dict.fromkeys((family, there) for family, _, _, _, there in ordered))


def connect(address: Address, timeout: float) -> socket.socket:
    """Connect to the first address of the host that answers. Each has `timeout` seconds.

    Raises:
        OSError: none of the addresses answers.
    """
    failure: OSError | None = None
    for family, there in resolve(address.host, address.port):
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.settimeout(timeout)
        try:
            sock.connect(there)
        except OSError as error:
            sock.close()
            failure = failure or error
        else:
            return sock
    raise failure or OSError(f"{address.host} has no address")


def listen(host: str, port: int, backlog: int = BACKLOG) -> list[socket.socket]:
    """Listen at every address of the host, all with the same port. Return a socket for each address.

    host: "" for all addresses of this host, including `::`. port: 0 for a free one.

    Raises:
        OSError: no address can be used, or the port of one is in use.
    """
    found: list[socket.socket] = []
    failure: OSError | None = None
    try:
        for family, there in resolve(host, port, passive=True):
            try:
                found.append(_listener(family, (there[0], port, *there[2:]), backlog, only_v6=bool(found)))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise
                failure = failure or error  # a name may have addresses that are not of this host
                continue
            port = found[0].getsockname()[1]
    except BaseException:
        for sock in found:
            sock.close()
        raise
    if not found:
        raise failure or OSError(f"{host} has no address")
    return found


def listen_within(host: str, ports: Sequence[int], backlog: int = BACKLOG) -> list[socket.socket]:
    """Listen at every address of the host, with the first of the ports that is free. See `listen`.

    Raises:
        OSError: no address can be used, or all ports are in use.
    """
    for port in ports:
        try:
            return listen(host, port, backlog)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    raise OSError(errno.EADDRINUSE, f"all {len(ports)} ports from {ports[0]} to {ports[-1]} are in use")


def reserve_port(host: str, ports: Sequence[int] = (0,)) -> socket.socket:
    """Return a socket that keeps a port of a host for a later `listen`, until it is closed. It does not listen.

    Args:
        ports: those to choose from; 0 stands for any free one.

    Raises:
        OSError: the address is not of this host, or all ports are in use.
    """
    family, there = resolve(host, passive=True)[0]
    failure: OSError | None = None
    for port in ports:
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as `listen` does: so both may have the port
        try:
            sock.bind((there[0], port, *there[2:]))
        except OSError as error:
            sock.close()
            failure = error
        else:
            return sock
    raise failure or OSError(f"{host} has no ports to choose from")


def address_towards(host: str) -> str:
    """Return the address of this host from which it connects to another host; "" if there is no way to that host."""
    try:
        family, there = resolve(host, 1)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect(there)  # sends nothing, but chooses the network interface
            return str(sock.getsockname()[0])
    except OSError:
        return ""


def _listener(family: socket.AddressFamily, there: tuple[Any, ...], backlog: int, *, only_v6: bool) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only_v6 or there[0] != "::")
        sock.bind(there)
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock


def is_loopback(host: str) -> bool:
    """Tell whether only processes of this host can reach it. False for an unknown name."""
    try:
        found = [_literal(str(there[0])) for _, there in resolve(host)]
    except OSError:
        return False
    return bool(found) and all(each is not None and each.is_loopback for each in found)


def is_local(host: str) -> bool:
    """Tell whether this is a loopback address or localhost, which means that all processes are on one host."""
    literal = _literal(host)
    return host == "localhost" or host.endswith(".localhost") or (literal is not None and literal.is_loopback)


def refuse_loopback_name(host: str, name: str) -> None:
    """Refuse a name that other hosts seem to be able to use, but that stands for a loopback address of this host.

    Raises:
        ConfigError: it is such a name. The message calls the option `name`.
    """
    if is_local(host) or not is_loopback(host):
        return
    found = ", ".join(str(there[0]) for _, there in resolve(host))
    raise ConfigError(
        f"{name} {host} is {found} on this host ({socket.gethostname()}), a loopback address that no other host "
        "can reach: give an address that the others can reach, or remove the name from that line of /etc/hosts; if all "
        "processes are on this host, give 127.0.0.1"
    )


def _literal(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return the IP address that a text is, or None for a name."""
    with suppress(ValueError):
        return ipaddress.ip_address(host)
    return None
