"""Network interfaces and RDMA devices, with recorded files of the kernel and made-up facts."""

import pytest

from shoal.doctor import network
from shoal.doctor.network import NetworkFacts
from shoal.wire.doctor import Finding
from shoal.wire.topology import Interface, RdmaPort
from support.recorded_host import Tree

LO = Interface(name="lo", addresses=("127.0.0.1",), up=True)
SLOW = Interface(name="eth0", addresses=("10.0.0.1",), physical=True, speed=125e6, mtu=1500, chosen=True)
FAST = Interface(name="ib0", addresses=("10.1.0.1",), physical=True, speed=50e9, mtu=4092, rdma="mlx5_0")
DOWN = Interface(name="eth1", up=False)


def by_kind(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.kind: finding for finding in findings}


def check(*interfaces: Interface, several: bool = True, target: str = "", **variables: str) -> dict[str, Finding]:
    return by_kind(network.check(NetworkFacts(interfaces, target=target), variables, several_hosts=several))


def test_the_files_of_the_kernel(tree: Tree) -> None:
    root = tree(
        {
            "sys/class/net/ib0/carrier": "1\n",
            "sys/class/net/ib0/mtu": "4092\n",
            "sys/class/net/ib0/speed": "400000\n",
            "sys/class/net/ib0/device/vendor": "0x15b3\n",
            "sys/class/net/lo/carrier": "1\n",
            "sys/class/net/eth9/carrier": "0\n",
            "sys/class/net/eth9/speed": "-1\n",
            "sys/class/net/bonding_masters": "bond0\n",
            "sys/class/infiniband/mlx5_0/device/net/ib0/mtu": "4092\n",
            "sys/class/infiniband/mlx5_0/ports/1/state": "4: ACTIVE\n",
            "sys/class/infiniband/mlx5_0/ports/1/rate": "400 Gb/sec (4X NDR)\n",
            "sys/class/infiniband/mlx5_0/ports/1/link_layer": "InfiniBand\n",
            "sys/class/infiniband/mlx5_1/ports/1/state": "1: DOWN\n",
        }
    )
    facts = network.gather("127.0.0.1", root, {"ib0": ["10.1.0.1"], "lo": ["127.0.0.1"]})
    assert facts.interfaces == (
        Interface(name="eth9", up=False),
        Interface(name="ib0", addresses=("10.1.0.1",), physical=True, mtu=4092, speed=50e9, rdma="mlx5_0"),
        Interface(name="lo", addresses=("127.0.0.1",), chosen=True),
    )
    assert facts.rdma == (
        RdmaPort(device="mlx5_0", port=1, layer="InfiniBand", active=True, speed=50e9),
        RdmaPort(device="mlx5_1", port=1),
    )


def test_this_host_has_a_loopback_address() -> None:
    assert "127.0.0.1" in network.interface_addresses()["lo"]


def test_which_interface_is_used() -> None:
    found = check(LO, SLOW, several=False)
    assert found["interfaces"].level == found["chosen-interface"].level == "ok"
    assert "eth0 (1 Gbit/s)" in found["chosen-interface"].text


def test_a_faster_interface_is_not_used() -> None:
    found = check(LO, SLOW, FAST, target="10.0.0.9")["chosen-interface"]
    assert (found.level, found.text) == (
        "warning",
        "connections to 10.0.0.9 use eth0 (1 Gbit/s), but ib0 has 400 Gbit/s",
    )
    assert check(LO, SLOW)["chosen-interface"].level == "warning", "1 Gbit/s is little between hosts"


@pytest.mark.parametrize(("several", "level"), [(True, "failure"), (False, "warning")])
def test_a_host_without_a_network(several: bool, level: str) -> None:
    assert check(LO, DOWN, several=several)["interfaces"].level == level


@pytest.mark.parametrize(
    ("value", "level"),
    [
        ("eth0", "ok"),
        ("eth", "ok"),
        ("=eth0", "ok"),
        ("=eth", "failure"),
        ("^docker", "ok"),
        ("bond", "failure"),
        ("eth1", "failure"),
    ],
)
def test_the_variable_of_nccl(value: str, level: str) -> None:
    found = check(LO, SLOW, DOWN, NCCL_SOCKET_IFNAME=value)["interface-variables"]
    assert found.level == level
    assert f"NCCL_SOCKET_IFNAME={value}" in found.text


@pytest.mark.parametrize(("value", "level"), [("eth0", "ok"), ("eth", "failure")])
def test_the_variable_of_gloo(value: str, level: str) -> None:
    assert check(LO, SLOW, GLOO_SOCKET_IFNAME=value)["interface-variables"].level == level


@pytest.mark.parametrize("name", ["SHOAL_HOST_IP", "VLLM_HOST_IP"])
def test_the_address_that_a_variable_names(name: str) -> None:
    down = Interface(name="eth2", addresses=("10.0.0.7",), up=False)

    def found_for(address: str, *interfaces: Interface) -> Finding:
        return by_kind(network.check(NetworkFacts(interfaces), {name: address}, several_hosts=True))["host-address"]

    assert found_for("10.0.0.1", LO, SLOW).level == "ok"
    found = found_for("10.77.0.9", LO, SLOW)
    assert found.level == "failure"
    assert found.text == f"{name}=10.77.0.9 is none of the addresses of this host: 10.0.0.1"
    found = found_for("10.0.0.7", LO, SLOW, down)
    assert (found.level, found.text) == ("failure", f"{name}=10.0.0.7: eth2 is down")
    assert "host-address" not in check(LO, SLOW)


@pytest.mark.parametrize(
    ("active", "level"), [((True, True), "ok"), ((True, False), "warning"), ((False, False), "warning")]
)
def test_ports_of_rdma_devices(active: tuple[bool, bool], level: str) -> None:
    ports = tuple(RdmaPort(device=f"mlx5_{number}", port=1, active=each) for number, each in enumerate(active))
    (finding,) = network.check_rdma(NetworkFacts(rdma=ports))
    assert (finding.kind, finding.level) == ("rdma", level)


def test_most_hosts_have_no_rdma() -> None:
    assert network.check_rdma(NetworkFacts()) == []
