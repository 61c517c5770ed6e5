"""Hosts and ports: as users write them, as sockets take them, and as they are shown."""

import errno
import ipaddress
import socket
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
        """`host:port`; an IPv6 address stands in brackets: `[fd02::1]:29550`.

        Raises:
            ConfigError: it is none.
        """
        host, _, port = text.rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        if not host.strip("[]") or (":" in host and not bracketed) or not (port.isascii() and port.isdigit()):
            raise ConfigError(f"a rendezvous is at HOST:PORT, or [IPV6]:PORT, got {text!r}")
        if not 0 < int(port) < 65536:
            raise ConfigError(f"a rendezvous is at HOST:PORT, with a port from 1 to 65535, got {text!r}")
        return cls(host_of(host, "a rendezvous"), int(port))

    def __str__(self) -> str:
        return joined(self.host, self.port)


def host_of(text: str, name: str) -> str:
    """A host alone, as an option has it: brackets around an IPv6 address go.

    Raises:
        ConfigError: there is a port behind it, or it is no address; the message calls the option `name`.
    """
    host = text.strip()
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    if not host or (":" in host and _literal(host) is None):
        raise ConfigError(f"{name} takes the name or the address of a host, without a port, got {text!r}")
    return host


def shown(host: str) -> str:
    """Return a host as URLs have it: with brackets around an IPv6 address."""
    return f"[{host}]" if isinstance(_literal(host), ipaddress.IPv6Address) else host


def joined(host: str, port: int) -> str:
    """`host:port`, with brackets around an IPv6 address."""
    return f"{shown(host)}:{port}"


Endpoint = tuple[socket.AddressFamily, tuple[Any, ...]]  # as a socket takes it


def resolved(host: str, port: int = 0, *, passive: bool = False) -> list[Endpoint]:
    """The addresses of a host, each with its family, as sockets take them. Those of IPv4 come first, on every host: so
    all that are told one name meet by the same kind of address. `passive`: to listen at; "" is all of this host's.

    Raises:
        OSError: nobody knows the name.
    """
    flags = socket.AI_PASSIVE if passive else 0
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=flags)
    ordered = sorted(found, key=lambda each: each[0] != socket.AF_INET)
    return list(dict.fromkeys((family, there) for family, _, _, _, there in ordered))


def connect(address: Address, timeout: float) -> socket.socket:
    """
    Raises:
        OSError: none of the host's addresses answers; each has `timeout` seconds.
    """
    failure: OSError | None = None
    for family, there in resolved(address.host, address.port):
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
    """A socket for each address of the host, all at one port; 0 is a free one. "" is all of this host's, `::` too.

    Raises:
        OSError: nobody can listen at any of them, or one is taken.
    """
    found: list[socket.socket] = []
    failure: OSError | None = None
    try:
        for family, there in resolved(host, port, passive=True):
            try:
                found.append(_listener(family, (there[0], port, *there[2:]), backlog, only_v6=bool(found)))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise
                failure = failure or error  # one of the name's addresses may be of another network, or host
                continue
            port = found[0].getsockname()[1]
    except BaseException:
        for sock in found:
            sock.close()
        raise
    if not found:
        raise failure or OSError(f"{host} has no address")
    return found


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
    """Do only processes of this host reach it? A name that nobody knows is not taken for that."""
    try:
        found = [_literal(str(there[0])) for _, there in resolved(host)]
    except OSError:
        return False
    return bool(found) and all(each is not None and each.is_loopback for each in found)


def is_local(host: str) -> bool:
    """Does it say that all are on one host: a loopback address, or a name of it?"""
    literal = _literal(host)
    return host == "localhost" or host.endswith(".localhost") or (literal is not None and literal.is_loopback)


def refuse_hidden_loopback(host: str, name: str) -> None:
    """Notices a name that looks like one for other hosts, and leads to this host's loopback.

    Raises:
        ConfigError: it is such a name; the message calls the option `name`.
    """
    if is_local(host) or not is_loopback(host):
        return
    found = ", ".join(str(there[0]) for _, there in resolved(host))
    raise ConfigError(
        f"{name} {host} is {found} on this host ({socket.gethostname()}), a loopback address that no other host "
        "reaches: give an address that the others reach, or take the name out of that line of /etc/hosts; where all "
        "are on this host, give 127.0.0.1"
    )


def _literal(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """None: it is a name."""
    with suppress(ValueError):
        return ipaddress.ip_address(host)
    return None
