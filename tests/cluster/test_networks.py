"""Addresses, ports and variables of a replica over two hosts (network namespaces)."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import hosts, processes
from support.programs import Program, Start, started_programs

pytestmark = [
    pytest.mark.slow,  # starts processes
    pytest.mark.skipif(bool(hosts.obstacle()), reason=hosts.obstacle()),
]

PORTS = range(31000, 31064)
SECOND = "10.213.77.12"  # another address of host 1
_LISTENS = "0A"  # the state of a listening socket in /proc/net/tcp
HTTP = 8123


@pytest.fixture
def start() -> Iterator[Start]:
    with started_programs() as run:
        yield run


@pytest.fixture(scope="module")
def two() -> Iterator[tuple[hosts.Host, hosts.Host]]:
    """Two hosts whose kernels choose from few ports; the second has a further address, on an interface of its own."""
    with hosts.two_hosts() as found:
        for host in found:
            run(host, "sh", "-c", f"echo {PORTS[0]} {PORTS[-1]} > /proc/sys/net/ipv4/ip_local_port_range")
        run(found[1], "ip", "link", "add", "second", "type", "veth", "peer", "unused")
        run(found[1], "ip", "address", "add", f"{SECOND}/32", "dev", "second")
        for name in ("second", "unused"):
            run(found[1], "ip", "link", "set", name, "up")
        yield found


def run(host: hosts.Host, *command: str) -> None:
    subprocess.run([*host.inside, *command], check=True, capture_output=True)


def serve(start: Start, two: tuple[hosts.Host, hosts.Host], rank: int, *flags: str, **environment: str) -> Program:
    common = ["-tp", "2", "--kv-cache-memory-bytes", "16MiB", "--max-model-len", "128", "--port", str(HTTP)]
    place = ["--nnodes", "2", "--node-rank", str(rank), "--master-addr", two[0].address, "--master-port", "31000"]
    command = [sys.executable, "-m", "shoal", "serve", "bundled", *common, *place, *flags]
    return start([*two[rank].inside, *command], SHOAL_CLUSTER_KEY="a key of the test", **environment)


def listening(pid: int) -> set[int]:
    """Return the ports at which the host of a process listens, on addresses that other hosts reach."""
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
            address, port = line.split()[1].split(":")
            if line.split()[3] == _LISTENS and not address.endswith("7F"):
                found.add(int(port, 16))
    return found


def environment_of(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def rank_of(pid: int) -> int:
    return next(
        each for each in processes.descendants(pid) if b"shoal.worker" in Path(f"/proc/{each}/cmdline").read_bytes()
    )


def test_a_named_address_a_range_of_ports_and_variables(start: Start, two: tuple[hosts.Host, hosts.Host]) -> None:
    ports = ["--port-range", f"{PORTS[0]}-{PORTS[-1]}"]
    other = serve(start, two, 1, *ports, "--headless", SHOAL_HOST_IP=SECOND, NCCL_IB_TIMEOUT="7")
    variables = {"NCCL_DEBUG": "WARN", "NCCL_IB_TIMEOUT": "22", "HF_TOKEN": "hf_secret", "VLLM_HOST_IP": two[0].address}
    server = serve(start, two, 0, *ports, **variables)
    server.await_text("Shoal serves")
    assert f"1 on {os.uname().nodename} ({SECOND}): " in server.text
    assert "get these variables unless they are set there: NCCL_DEBUG, NCCL_IB_TIMEOUT\n" in server.text
    assert "ranks (gloo, NCCL) open ports" not in server.text
    for program in (server, other):
        found = listening(program.process.pid) - {HTTP}
        assert found  # of the engine's listener, or of gloo
        assert found <= set(PORTS)
    far = environment_of(rank_of(other.process.pid))
    assert far["NCCL_SOCKET_IFNAME"] == "=second"
    assert far["GLOO_SOCKET_IFNAME"] == "second"
    assert (far["NCCL_DEBUG"], far["NCCL_IB_TIMEOUT"]) == ("WARN", "7")
    assert "HF_TOKEN" not in far
    near = environment_of(rank_of(server.process.pid))
    assert near["NCCL_SOCKET_IFNAME"].startswith("=sh")


def test_ports_that_the_kernel_chooses_are_named(start: Start, two: tuple[hosts.Host, hosts.Host]) -> None:
    server = serve(start, two, 0, "--port-range", "31000-31009")
    server.await_text("ranks (gloo, NCCL) open ports that the kernel chooses from 31000-31063, not only from")


def test_nodes_with_wrong_addresses_end(start: Start, two: tuple[hosts.Host, hosts.Host]) -> None:
    address = serve(start, two, 1, "--headless", SHOAL_HOST_IP="10.9.9.9")
    interface = serve(start, two, 1, "--headless", GLOO_SOCKET_IFNAME="second")
    for node, message in (
        (address, "error: SHOAL_HOST_IP 10.9.9.9 is no address of this host"),
        (interface, "error: GLOO_SOCKET_IFNAME=second does not allow sh"),
    ):
        assert node.await_end() == 2, node.text
        (error,) = [line for line in node.text.splitlines() if line.startswith("error: ")]
        assert error.startswith(message)
