"""Checks of ports and addresses, with real sockets on the loopback interface."""

import contextlib
import errno
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from shoal.doctor import ports
from shoal.doctor.ports import AddressFacts, PortFacts
from support.hosts import free_port


def test_this_host_reaches_itself() -> None:
    facts = ports.gather("127.0.0.1")
    assert facts == PortFacts("127.0.0.1", 0)
    assert ports.check_loopback(facts).level == "ok"


def test_others_that_connect_at_the_same_time_do_not_disturb() -> None:
    """The other hosts try to reach the meeting from their start on."""
    port, ended = free_port(), threading.Event()

    def connect() -> None:
        while not ended.is_set():
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 1).close()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(connect)
        found = {ports.gather("127.0.0.1", port) for _ in range(10)}
        ended.set()
    assert found == {PortFacts("127.0.0.1", port)}


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        (finding,) = ports.check_master(ports.gather("127.0.0.1", port), nnodes=2)
    assert (finding.kind, finding.level) == ("port", "failure")
    assert f"port {port} is taken" in finding.text
    assert "ss -ltnp" in finding.mend


@pytest.mark.parametrize("address", ["203.0.113.7", "no-such-host.invalid"])
def test_an_address_that_is_not_of_this_host(address: str) -> None:
    (finding,) = ports.check_master(ports.gather(address, 29599), nnodes=2)
    assert (finding.kind, finding.level) == ("master-address", "failure")
    assert address in finding.text


@pytest.mark.parametrize(
    ("facts", "nnodes", "kind", "level"),
    [
        (PortFacts("10.0.0.1", 29599), 2, "port", "ok"),
        (PortFacts("127.0.0.1", 29599), 2, "master-address", "warning"),
        (PortFacts("127.0.0.1", 29599), 1, "port", "ok"),
        (PortFacts("10.0.0.1", 80, listen_error=errno.EACCES), 2, "port", "failure"),
        (PortFacts("10.0.0.1", 29599, connect_error="Connection refused"), 2, "loopback", "failure"),
    ],
)
def test_the_meeting_place(facts: PortFacts, nnodes: int, kind: str, level: str) -> None:
    finding = ports.check_master(facts, nnodes=nnodes)[-1]
    assert (finding.kind, finding.level) == (kind, level)


def test_the_first_host_is_another_one() -> None:
    (finding,) = ports.check_other_master("10.0.0.2", 1, ["127.0.0.1", "10.0.0.2"])
    assert (finding.kind, finding.level, "--node-rank 1" in finding.text) == ("master-address", "warning", True)
    assert ports.check_other_master("10.0.0.1", 1, ["127.0.0.1", "10.0.0.2"]) == []
    assert ports.check_other_master("127.0.0.1", 1, ["127.0.0.1"]) == []


@pytest.mark.parametrize(
    ("facts", "several", "level"),
    [
        (AddressFacts("node1", ("10.0.0.1",)), True, "ok"),
        (AddressFacts("node1", ("127.0.1.1",), loopback=True), True, "warning"),
        (AddressFacts("node1", ("127.0.1.1",), loopback=True), False, "ok"),
        (AddressFacts("node1"), False, "warning"),
    ],
)
def test_the_name_of_the_host(facts: AddressFacts, several: bool, level: str) -> None:
    assert ports.check_name(facts, several_hosts=several).level == level
