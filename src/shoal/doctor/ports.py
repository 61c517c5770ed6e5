"""Ports and addresses: this host connects back to itself, and can listen where the hosts should meet."""

import errno
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from shoal import addresses
from shoal.addresses import Address, join_host_port
from shoal.doctor.kinds import failure, ok, warning
from shoal.wire.doctor import Finding

_TIMEOUT_S = 2.0
_NONCE = 16
_STRANGERS = 100  # connections of others that are sent away before this host gives up


@dataclass(frozen=True, slots=True)
class PortFacts:
    """The result of listening at an address and of connecting to it."""

    host: str
    port: int  # 0: any
    listen_error: int | None = None  # the number of the operating system's error; -1: the name is unknown
    connect_error: str = ""


@dataclass(frozen=True, slots=True)
class AddressFacts:
    """The addresses for which a host name or an address stands."""

    text: str
    found: tuple[str, ...] = ()  # addresses
    loopback: bool = False


def gather(host: str, port: int = 0) -> PortFacts:
    """Listen at an address, connect to it, and see whether the same bytes arrive."""
    try:
        sockets = addresses.listen(host, port)
    except socket.gaierror:
        return PortFacts(host, port, listen_error=-1)
    except OSError as error:
        return PortFacts(host, port, listen_error=error.errno or -1)
    try:
        return PortFacts(host, port, connect_error=_connect_back(host, sockets[0]))
    finally:
        for each in sockets:
            each.close()


def _connect_back(host: str, listener: socket.socket) -> str:
    """Return why a connection to this socket fails, or "" if it works.

    Another host may connect at the same time, since it expects the meeting here: it is sent away, and tries again.
    """
    nonce = secrets.token_bytes(_NONCE)
    listener.settimeout(_TIMEOUT_S)
    try:
        with addresses.connect(Address(host, listener.getsockname()[1]), _TIMEOUT_S) as sock:
            for _ in range(_STRANGERS):
                accepted, peer = listener.accept()
                with accepted:
                    if peer[:2] == sock.getsockname()[:2]:
                        accepted.sendall(nonce)
                        break
            received = sock.recv(_NONCE, socket.MSG_WAITALL)
    except OSError as error:
        return error.strerror or str(error)
    return "" if received == nonce else "other bytes arrived"


def gather_name(name: str) -> AddressFacts:
    """Look up the addresses of a host name."""
    try:
        found = tuple(str(there[0]) for _, there in addresses.resolve(name))
    except OSError:
        return AddressFacts(name)
    return AddressFacts(name, found, addresses.is_loopback(name))


def check_loopback(facts: PortFacts) -> Finding:
    """Check that this host can connect to itself, on a port that the operating system has chosen."""
    if facts.listen_error is not None:
        return failure("loopback", f"no process can listen at {facts.host}: {_described(facts.listen_error)}")
    if facts.connect_error:
        return failure("loopback", f"a connection to {facts.host} on this host fails: {facts.connect_error}")
    return ok("loopback", f"connections to {facts.host} arrive")


def check_master(facts: PortFacts, *, nnodes: int) -> list[Finding]:
    """Check the address and the port where the host with rank 0 listens."""
    address = join_host_port(facts.host, facts.port)
    if facts.listen_error == errno.EADDRINUSE:
        return [failure("port", f"port {facts.port} is taken: another program listens at {address}")]
    if facts.listen_error in (errno.EADDRNOTAVAIL, -1):
        known = "is unknown" if facts.listen_error == -1 else "is no address of this host"
        return [failure("master-address", f"{facts.host} {known}, but --node-rank 0 must listen there")]
    if facts.listen_error is not None:
        return [failure("port", f"no process can listen at {address}: {_described(facts.listen_error)}")]
    if facts.connect_error:
        return [failure("loopback", f"a connection to {address} on this host fails: {facts.connect_error}")]
    found = [ok("port", f"{address} is free, and connections to it arrive")]
    if nnodes > 1 and addresses.is_loopback(facts.host):
        found.append(warning("master-address", f"{facts.host} is a loopback address, which other hosts cannot reach"))
    return found


def check_other_master(master: str, node_rank: int, own: Sequence[str]) -> list[Finding]:
    """Check that the first host is another one. `own`: the addresses of this host, which does not have rank 0."""
    if master in own and not addresses.is_local(master):
        text = f"{master} is an address of this host, but it has --node-rank {node_rank}: only rank 0 listens there"
        return [warning("master-address", text)]
    return []


def check_name(facts: AddressFacts, *, several_hosts: bool) -> Finding:
    """Check that the name of this host stands for an address. Between several hosts, others must reach it."""
    if not facts.found:
        return warning("host-name", f"the name {facts.text} has no address")
    shown = ", ".join(facts.found)
    if facts.loopback and several_hosts:
        return warning("host-name", f"{facts.text} is {shown}, which other hosts cannot reach")
    return ok("host-name", f"{facts.text} is {shown}")


def _described(number: int) -> str:
    return "the name is unknown" if number == -1 else errno.errorcode.get(number, str(number))
