"""Several hosts on one machine: network namespaces with IPv4 and IPv6 addresses, joined by a virtual cable."""

import ctypes
import json
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_NETWORK = 0x40000000  # CLONE_NEWNET
_ALL_PROTOCOLS = 3  # ETH_P_ALL
_QUIET_S = 0.2


@dataclass(frozen=True, slots=True)
class Host:
    netns: str
    address: str
    address_v6: str
    link_local: str  # with the name of the interface

    @property
    def inside(self) -> list[str]:
        """The beginning of a command that runs on this host."""
        return ["ip", "netns", "exec", self.netns]

    def connect(self, address: tuple[str, int], timeout: float) -> socket.socket:
        """Return a connection that starts on this host."""
        with ThreadPoolExecutor(1) as pool:  # only this thread moves to the host, and its sockets stay there
            return pool.submit(self._connect, address, timeout).result()

    def _connect(self, address: tuple[str, int], timeout: float) -> socket.socket:
        _enter(self)
        return socket.create_connection(address, timeout)


def _enter(host: Host) -> None:
    """Move this thread to a host."""
    with (Path("/run/netns") / host.netns).open() as place:
        if ctypes.CDLL(None, use_errno=True).setns(place.fileno(), _NETWORK):
            raise OSError(ctypes.get_errno(), f"no way into {host.netns}")


def free_port() -> int:
    """Return a free port on the loopback, where other programs may listen too."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def obstacle() -> str:
    """Return why such hosts can't be made here; "" if they can."""
    if shutil.which("ip") is None:
        return "needs iproute2"
    name = f"shoal-try-{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return "needs the right to make network namespaces"
    _ip("netns", "del", name)
    return ""


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    cable = f"sh{os.getpid() % 10**8}"
    first, second = (
        Host(f"shoal-{os.getpid()}-{i}", f"10.213.77.{i}", f"fd02:213:77::{i}", f"fe80::77:{i}%{cable}{end}")
        for i, end in ((1, "a"), (2, "b"))
    )
    try:
        for host in (first, second):
            _ip("netns", "add", host.netns)
        _ip(
            "link", "add", f"{cable}a", "netns", first.netns, "type", "veth", "peer", f"{cable}b", "netns", second.netns
        )
        for host, end in ((first, "a"), (second, "b")):
            _ip("-n", host.netns, "address", "add", f"{host.address}/24", "dev", f"{cable}{end}")
            for address in (host.address_v6, host.link_local.partition("%")[0]):
                _ip("-n", host.netns, "address", "add", f"{address}/64", "dev", f"{cable}{end}", "nodad")
            _ip("-n", host.netns, "link", "set", f"{cable}{end}", "up")
            _ip("-n", host.netns, "link", "set", "lo", "up")
        yield first, second
    finally:
        for host in (first, second):
            subprocess.run(["ip", "netns", "del", host.netns], capture_output=True, check=False)


def cut(host: Host) -> None:
    """Cut a host off from the network."""
    for link in _links(host):
        _ip("-n", host.netns, "link", "set", link["ifname"], "down")


def join(host: Host) -> None:
    """Undo `cut`. The host has its IPv4 address only."""
    for link in _links(host):
        _ip("-n", host.netns, "link", "set", link["ifname"], "up")


def limit_rate(host: Host, mbits: int | None) -> None:
    """Limit what a host can send to `mbits` Mbit/s; None: no limit any more."""
    for link in _links(host):
        where = ["-n", host.netns, "qdisc"]
        subprocess.run(["tc", *where, "del", "dev", link["ifname"], "root"], capture_output=True, check=False)
        if mbits is not None:
            rate = ["tbf", "rate", f"{mbits}mbit", "burst", "256kbit", "latency", "50ms"]
            command = ["tc", *where, "add", "dev", link["ifname"], "root", *rate]
            subprocess.run(command, capture_output=True, text=True, check=True)


def sent_bytes(host: Host) -> int:
    """Return how many bytes the host has sent to other hosts."""
    return sum(int(link["stats64"]["tx"]["bytes"]) for link in _links(host))


def _links(host: Host) -> list[dict[str, Any]]:
    """Return the network interfaces of a host, without the loopback."""
    found = subprocess.run(["ip", "-n", host.netns, "-s", "-j", "link"], capture_output=True, text=True, check=True)
    return [link for link in json.loads(found.stdout) if link["ifname"] != "lo"]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)


@contextmanager
def recorded(host: Host) -> Iterator[bytearray]:
    """Yield the bytes of all packets between this host and others. They are complete after the block."""
    found, ended = bytearray(), threading.Event()
    with ThreadPoolExecutor(1) as pool:  # only this thread moves to the host
        pool.submit(_enter, host).result()
        tap = pool.submit(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL_PROTOCOLS)).result()
        with tap:
            tap.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 26)
            tap.settimeout(_QUIET_S)
            recording = pool.submit(_record, tap, found, ended)
            try:
                yield found
            finally:
                ended.set()
                recording.result()


def _record(tap: socket.socket, found: bytearray, ended: threading.Event) -> None:
    """Add packets to `found`, until it has ended and none comes any more."""
    while True:
        try:
            packet, (interface, *_) = tap.recvfrom(1 << 17)
        except TimeoutError:
            if ended.is_set():
                return
        else:
            if interface != "lo":
                found += packet
