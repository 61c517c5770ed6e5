"""The address of this host as other hosts reach it, and the ports that may be opened for them."""

import socket
from pathlib import Path

from shoal import env
from shoal.addresses import address_towards, resolve
from shoal.config.engine_options import EngineOptions
from shoal.devices import network
from shoal.errors import ConfigError
from shoal.log import get_logger
from shoal.values import numbered

log = get_logger("network")

_KERNEL_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")


def own_address(leader: str) -> str:
    """Return the address of this host, as the host named `leader` and all others reach it; "" if it is not known.

    It is the one that SHOAL_HOST_IP names, or the one from which this host connects to the leader.

    Raises:
        ConfigError: this host does not have the address, or a variable names a network interface that does not have it.
    """
    named = env.host_ip()
    if named is None:
        found = address_towards(leader)
    else:
        variable, found = named
        if not network.interface_of(found):
            there = ", ".join(f"{address} ({name})" for address, name in network.interfaces().items())
            raise ConfigError(
                f"{variable} {found} is no address of this host ({socket.gethostname()}), which has {there}: give one "
                "that other hosts can reach"
            )
    _check_interfaces(found)
    return found


def leader_address(host: str, flag: str) -> str:
    """Return the address of this host, where the others come.

    Args:
        host, flag: the value of the option for that address, and its flag.

    Raises:
        ConfigError: SHOAL_HOST_IP is another address, nothing is known about this one, or a variable names a network
            interface that does not have it.
    """
    try:
        found = [str(there[0]) for _, there in resolve(host)]
    except OSError as error:
        raise ConfigError(f"{flag} {host}: {error.strerror}; give an address of this host") from None
    named = env.host_ip()
    if named is None:
        _check_interfaces(found[0])
        return found[0]
    variable, address = named
    own_address(host)
    if address not in found:
        raise ConfigError(
            f"{variable} is {address}, but {flag} {host} is {', '.join(found)}, and both are addresses of this host: "
            "give the same address in both"
        )
    return address


def _check_interfaces(address: str) -> None:
    """Check that the variables that name network interfaces allow the interface of this host's address.

    Raises:
        ConfigError: one does not.
    """
    name = network.interface_of(address)
    for variable, value in env.socket_interfaces().items():
        exact = variable.startswith("GLOO") and name in value.split(",")
        if name and not exact and not (variable.startswith("NCCL") and network.allows_interface(value, name)):
            raise ConfigError(
                f"{variable}={value} does not allow {name}, the interface with the address {address} of this host: "
                f"unset it, or set SHOAL_HOST_IP to an address of the interface that is meant"
            )


def check_ports(options: EngineOptions, flag: str, port: int, listeners: int) -> None:
    """Check that --port-range has enough ports.

    Args:
        flag, port: the option for the port where other hosts come, and its value.
        listeners: how many ports this host opens: that one, and one for each engine.

    Raises:
        ConfigError: it has fewer, or `port` is not one of them.
    """
    ports = options.nodes.port_range
    if ports is None:
        return
    first, last = ports
    if not first <= port <= last:
        raise ConfigError(
            f"{flag} {port} is outside of --port-range {first}-{last}: choose one inside, the same on all hosts"
        )
    count = last - first + 1
    if count < listeners:
        raise ConfigError(
            f"--port-range {first}-{last} has {numbered(count, 'port')}, but this host opens {listeners} for others: "
            f"one for {flag} and one for each of {numbered(listeners - 1, 'engine')}; give a larger range"
        )


def warn_of_kernel_ports(options: EngineOptions) -> None:
    """Warn if ranks open ports outside of --port-range: their libraries let the kernel choose."""
    ports = options.nodes.port_range
    if ports is None:
        return
    try:
        first, last = map(int, _KERNEL_PORTS.read_text().split())
    except (OSError, ValueError):
        first, last = 1, 65535
    if first < ports[0] or last > ports[1]:
        log.warning(
            "ranks (gloo, NCCL) open ports that the kernel chooses from %d-%d, not only from --port-range %d-%d: to "
            'confine them too, run sysctl -w net.ipv4.ip_local_port_range="%d %d" on each host',
            *(first, last, *ports, *ports),
        )
