"""The address of this host, as variables name it, and the ports that may be opened."""

from functools import partial

import pytest

from shoal.config.engine_options import EngineOptions
from shoal.devices.network import allows_interface, interface_of, interfaces
from shoal.errors import ConfigError
from shoal.launch.deployment import Deployment
from shoal.launch.host_network import leader_address, own_address


def test_interfaces() -> None:
    assert interfaces()["127.0.0.1"] == interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.9") == ""


@pytest.mark.parametrize(
    ("value", "allowed"),
    [
        ("eth0", True),
        ("eth", True),
        ("ib0,eth", True),
        ("ib", False),
        ("=eth0", True),
        ("=eth", False),
        ("^docker,lo", True),
        ("^eth", False),
        ("^=eth", True),
    ],
)
def test_the_form_of_interfaces_of_nccl(value: str, allowed: bool) -> None:
    assert allows_interface(value, "eth0") is allowed


@pytest.mark.parametrize("variable", ["SHOAL_HOST_IP", "VLLM_HOST_IP"])
def test_a_variable_names_the_address_of_this_host(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "127.0.0.1")
    assert own_address("203.0.113.9") == "127.0.0.1"
    assert leader_address("127.0.0.1", "--master-addr") == "127.0.0.1"
    monkeypatch.setenv(variable, "203.0.113.9")
    with pytest.raises(ConfigError, match=rf"{variable} 203.0.113.9 is no address of this host .*127.0.0.1 \(lo\)"):
        own_address("127.0.0.1")


def test_a_variable_that_contradicts_the_address_of_the_leader(monkeypatch: pytest.MonkeyPatch) -> None:
    other = next(address for address in interfaces() if address not in ("127.0.0.1", "::1"))
    monkeypatch.setenv("SHOAL_HOST_IP", other)
    with pytest.raises(ConfigError, match=r"SHOAL_HOST_IP is .*, but --master-addr 127.0.0.1 is 127.0.0.1, and both"):
        leader_address("127.0.0.1", "--master-addr")


def test_an_unknown_name_of_the_leader() -> None:
    with pytest.raises(ConfigError, match=r"--master-addr shoal.invalid: .*; give an address of this host"):
        leader_address("shoal.invalid", "--master-addr")


@pytest.mark.parametrize(
    ("variable", "wrong", "right"),
    [("GLOO_SOCKET_IFNAME", "l", "eth7,lo"), ("NCCL_SOCKET_IFNAME", "^lo", "l")],
)
def test_a_variable_that_names_another_interface(
    monkeypatch: pytest.MonkeyPatch, variable: str, wrong: str, right: str
) -> None:
    monkeypatch.setenv(variable, wrong)
    for address in (own_address, partial(leader_address, flag="--master-addr")):
        with pytest.raises(ConfigError) as caught:
            address("127.0.0.1")
        assert f"{variable}={wrong} does not allow lo, the interface with the address 127.0.0.1" in str(caught.value)
    monkeypatch.setenv(variable, right)
    assert own_address("127.0.0.1") == "127.0.0.1"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "--master-port 29501 is outside of --port-range 31000-31001: choose one inside, the same on all hosts"),
        (
            {"master_port": 31000, "nnodes": 4, "data_parallel_size": 2},
            "--port-range 31000-31001 has 2 ports, but this host opens 3 for others: one for --master-port and one for "
            "each of 2 engines",
        ),
    ],
    ids=["outside", "too few"],
)
def test_a_range_of_ports_that_does_not_do(given: dict[str, object], message: str) -> None:
    options = {"nnodes": 2, "master_addr": "127.0.0.1", "tensor_parallel_size": 2, "port_range": "31000-31001", **given}
    with pytest.raises(ConfigError) as caught:
        Deployment.of(EngineOptions.from_flat(None, options))
    assert message in str(caught.value)


@pytest.mark.parametrize("value", ["31000", "31001-31000", "0-5", "1-65536", "a-b", [1], [True, 5], ""])
def test_values_that_are_no_range_of_ports(value: object) -> None:
    with pytest.raises(ConfigError, match="--port-range takes the first and the last port, such as 31000-31099, got"):
        EngineOptions.from_flat(None, {"port_range": value})
