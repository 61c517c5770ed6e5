"""Hosts of their own on one machine: network namespaces with an address each, joined by a cable."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Host:
    netns: str
    address: str

    @property
    def inside(self) -> list[str]:
        """What a command that runs on it starts with."""
        return ["ip", "netns", "exec", self.netns]


def free_port() -> int:
    """On loopback, where others listen too."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def obstacle() -> str:
    """Why there can be none here; "" if they can be made."""
    if shutil.which("ip") is None:
        return "needs iproute2"
    name = f"shoal-try-{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return "needs the right to make network namespaces"
    _ip("netns", "del", name)
    return ""


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    first, second = (Host(f"shoal-{os.getpid()}-{i}", f"10.213.77.{i}") for i in (1, 2))
    cable = f"sh{os.getpid() % 10**8}"
    try:
        for host in (first, second):
            _ip("netns", "add", host.netns)
        _ip(
            "link", "add", f"{cable}a", "netns", first.netns, "type", "veth", "peer", f"{cable}b", "netns", second.netns
        )
        for host, end in ((first, "a"), (second, "b")):
            _ip("-n", host.netns, "address", "add", f"{host.address}/24", "dev", f"{cable}{end}")
            _ip("-n", host.netns, "link", "set", f"{cable}{end}", "up")
            _ip("-n", host.netns, "link", "set", "lo", "up")
        yield first, second
    finally:
        for host in (first, second):
            subprocess.run(["ip", "netns", "del", host.netns], capture_output=True, check=False)


def cut(host: Host) -> None:
    """Takes a host off the network."""
    links = subprocess.run(["ip", "-n", host.netns, "-o", "link"], capture_output=True, text=True, check=True).stdout
    for line in links.splitlines():
        name = line.split(": ")[1].split("@")[0]
        if name != "lo":
            _ip("-n", host.netns, "link", "set", name, "down")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)
