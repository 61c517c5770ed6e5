"""The network interfaces of this host, and the addresses of each. This module is free of torch."""

import ctypes
import socket
import struct
from collections.abc import Iterator

from shoal import env

_libc = ctypes.CDLL(None, use_errno=True)


class _Entry(ctypes.Structure):
    """The beginning of a `struct ifaddrs` of the C library."""


_Entry._fields_ = [
    ("next", ctypes.POINTER(_Entry)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.c_void_p),
]


def interfaces() -> dict[str, str]:
    """Return the addresses of this host, each with the name of its interface.

    Link-local addresses of IPv6 have the form `fe80::1%eth0`.

    Raises:
        OSError: the kernel does not show them.
    """
    first = ctypes.POINTER(_Entry)()
    if _libc.getifaddrs(ctypes.byref(first)):
        raise OSError(ctypes.get_errno(), "getifaddrs failed")
    try:
        return dict(_addresses(first))
    finally:
        _libc.freeifaddrs(first)


def _addresses(entry: "ctypes._Pointer[_Entry]") -> Iterator[tuple[str, str]]:
    while entry:
        found = entry.contents
        if found.address:
            name = found.name.decode()
            (family,) = struct.unpack("H", ctypes.string_at(found.address, 2))
            if family == socket.AF_INET:
                yield socket.inet_ntop(family, ctypes.string_at(found.address + 4, 4)), name
            elif family == socket.AF_INET6:
                text = socket.inet_ntop(family, ctypes.string_at(found.address + 8, 16))
                yield (f"{text}%{name}" if text.startswith("fe80:") else text), name
        entry = found.next


def interface_of(address: str) -> str:
    """Return the name of the interface that has an address; "" if this host does not have the address."""
    return interfaces().get(address, "")


def socket_environment(address: str) -> dict[str, str]:
    """Return the environment variables by which gloo and NCCL use the interface of an address, unless they are set."""
    name = interface_of(address)
    return env.not_set_here({"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"}) if name else {}


def allows_interface(value: str, name: str) -> bool:
    """Return whether NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME allows an interface.

    NCCL's form: names or beginnings of names with commas between them; after `=` whole names only; after `^` those that
    are not allowed.
    """
    exact, excluded = "=" in value[:2], value.startswith("^")
    listed = [part for part in value.lstrip("^=").split(",") if part]
    found = any(name == part or (not exact and name.startswith(part)) for part in listed)
    return found != excluded
