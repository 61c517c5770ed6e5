"""Deployments over hosts: which replicas run where, and which combinations of options are refused."""

import socket
from typing import Any

import pytest

from shoal.config.engine_options import EngineOptions
from shoal.errors import ConfigError
from shoal.launch.deployment import DEFAULT_PORT, Deployment, Mode
from shoal.wire.credentials import Credentials

ADDRESS: dict[str, Any] = {"data_parallel_address": "127.0.0.1"}


def deployment(size: int = 4, **options: Any) -> Deployment:
    names = {"rank": "data_parallel_rank", "start": "data_parallel_start_rank", "local": "data_parallel_size_local"}
    names["hybrid"] = "data_parallel_hybrid_lb"
    given = {names.get(name, name): value for name, value in options.items()}
    return Deployment.of(EngineOptions.from_flat(None, {"data_parallel_size": size, **given}))


def test_by_default_all_replicas_are_on_this_host() -> None:
    found = deployment()
    assert (found.mode, list(found.local), list(found.awaited)) == (Mode.ALONE, [0, 1, 2, 3], [])
    assert not found.listens
    assert (found.place.size, found.place.local_size) == (4, 4)


@pytest.mark.parametrize("options", [{"local": 4, **ADDRESS}, {"hybrid": True, **ADDRESS}])
def test_a_host_with_all_replicas_awaits_none(options: dict[str, Any]) -> None:
    found = deployment(**options)
    assert (found.mode, list(found.local), found.listens) == (Mode.ALONE, [0, 1, 2, 3], False)


def test_a_front_end_awaits_the_replicas_that_are_not_here() -> None:
    found = deployment(local=1, data_parallel_rpc_port=4242, **ADDRESS)
    assert (found.mode, list(found.local), list(found.awaited)) == (Mode.HEAD, [0], [1, 2, 3])
    assert found.listens
    assert str(found.address) == "127.0.0.1:4242"
    assert found.place.local_size == 1


def test_a_front_end_may_have_no_replicas_of_its_own() -> None:
    found = deployment(local=0, **ADDRESS)
    assert (list(found.local), list(found.awaited), found.listens) == ([], [0, 1, 2, 3], True)
    assert (found.place.size, found.place.local_size, list(found.served_elsewhere)) == (4, 0, [])
    assert str(found.address) == f"127.0.0.1:{DEFAULT_PORT}"
    assert deployment(1, local=0, **ADDRESS).mode is Mode.HEAD


def test_an_address_may_be_an_ipv6_address() -> None:
    for given in ("fd02::1", "[fd02::1]"):
        with pytest.raises(ConfigError, match="other hosts can reach fd02::1, but there is no shared key"):
            deployment(local=1, data_parallel_address=given)
    assert str(deployment(local=1, data_parallel_address="::1").address) == f"[::1]:{DEFAULT_PORT}"
    with pytest.raises(
        ConfigError, match="--data-parallel-address must be the name or the address of a host, without a"
    ):
        deployment(local=1, data_parallel_address="127.0.0.1:29550")


@pytest.mark.parametrize("options", [{"local": 1}, {"rank": 1}, {"headless": True, "start": 1}])
def test_a_name_of_a_loopback_address_is_refused(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's /etc/hosts gives the host's own name such an address, which other hosts cannot reach."""
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *more, **named: real("127.0.1.1", *more, **named))
    with pytest.raises(ConfigError, match=r"--data-parallel-address head is 127\.0\.1\.1 on this host .*, a loopback"):
        deployment(data_parallel_address="head", **options)


def test_a_headless_host_runs_the_remaining_replicas_unless_a_number_is_given() -> None:
    found = deployment(headless=True, start=1, **ADDRESS)
    assert (found.mode, list(found.local), found.listens) == (Mode.HEADLESS, [1, 2, 3], False)
    assert list(deployment(headless=True, start=1, local=2, **ADDRESS).local) == [1, 2]
    assert list(deployment(headless=True, rank=2, **ADDRESS).local) == [2]
    assert list(deployment(1, headless=True, **ADDRESS).local) == [0]
    assert deployment(headless=True, start=0, **ADDRESS).mode is Mode.HEADLESS


def test_peers_meet_where_replica_0_is() -> None:
    assert [deployment(rank=number, **ADDRESS).listens for number in range(3)] == [True, False, False]
    second = deployment(hybrid=True, start=2, local=2, **ADDRESS)
    assert (second.mode, list(second.local), list(second.awaited), second.listens) == (Mode.PEERS, [2, 3], [], False)
    assert (second.place.rank, second.place.size, second.place.local_size) == (2, 4, 2)
    assert list(second.served_elsewhere) == [0, 1]
    assert deployment(hybrid=True, local=2, **ADDRESS).listens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"headless": True, "start": 3, "local": 2},
            "3 and --data-parallel-size-local 2 reach up to replica 4, .* is 4",
        ),
        ({"local": 5}, "0 and --data-parallel-size-local 5 reach up to replica 4, but --data-parallel-size is 4"),
        ({"headless": True, "start": 4}, "--data-parallel-start-rank 4 does not exist with --data-parallel-size 4"),
        ({"rank": 4}, "--data-parallel-rank 4 does not exist with --data-parallel-size 4"),
        ({"headless": True}, "say which of the 4 replicas run here"),
        ({"headless": True, "start": 0, "local": 0}, "--data-parallel-size-local 0: this host would have no replicas"),
        ({"hybrid": True, "local": 0}, "--data-parallel-size-local 0: this host would have no replicas"),
        ({"hybrid": True, "rank": 1}, "--data-parallel-rank 1 serves one replica, but --data-parallel-hybrid-lb"),
        ({"hybrid": True, "headless": True}, "--headless does not serve, but --data-parallel-hybrid-lb serves"),
        ({"rank": 1, "start": 2}, "--data-parallel-rank 1 and --data-parallel-start-rank 2: leave one out"),
        ({"rank": 1, "local": 2}, "--data-parallel-rank 1 is one replica, but --data-parallel-size-local is 2"),
        ({"start": 2, "local": 2}, "--data-parallel-start-rank 2 needs --headless"),
        ({"local": 1, "distributed_executor_backend": "threads"}, "replicas on several hosts must be processes"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        deployment(**options, **ADDRESS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"headless": True, "start": 2}, "the front end of the 4 replicas is elsewhere, .* that serves$"),
        ({"local": 1}, "1 of 4 replicas run here, the others elsewhere, .* that serves$"),
        ({"rank": 1}, "1 of 4 replicas run here, .* --data-parallel-address is missing.* that has replica 0$"),
    ],
)
def test_several_hosts_need_an_address(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        deployment(**options)


def test_other_hosts_need_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHOAL_CLUSTER_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"other hosts can reach 192\.0\.2\.1, but there is no shared key"):
        deployment(rank=1, data_parallel_address="192.0.2.1")
    monkeypatch.setenv("SHOAL_CLUSTER_KEY", "secret")
    assert deployment(rank=1, data_parallel_address="192.0.2.1").credentials == Credentials("secret")


# --- a replica over several hosts --------------------------------------------------------------------------------

NODES: dict[str, Any] = {"nnodes": 4, "master_addr": "127.0.0.1", "tensor_parallel_size": 2}


def test_nodes_are_divided_among_the_replicas() -> None:
    found = deployment(2, **NODES, node_rank=3, master_port=4242)
    assert found.nodes is not None
    assert (found.nodes.size, found.nodes.rank, found.nodes.per_replica) == (4, 3, 2)
    assert [list(found.nodes.of_replica(number)) for number in range(2)] == [[0, 1], [2, 3]]
    assert str(found.nodes.address) == "127.0.0.1:4242"
    assert (list(found.local), found.place.local_size) == ([0, 1], 0)
    assert deployment(1).nodes is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"node_rank": 4}, "--node-rank 4 does not exist with --nnodes 4: ranks count from 0"),
        ({"node_rank": 5, "spare_hosts": 1}, "--node-rank 5 does not exist with --nnodes 4 and --spare-hosts 1"),
        ({"nnodes": 1, "spare_hosts": 1}, "--spare-hosts replace a host of several: give --nnodes too"),
        ({"nnodes": 1, "node_rank": 1}, "--node-rank 1 does not exist with --nnodes 1"),
        ({"master_addr": None}, "--nnodes 4 needs --master-addr: give all hosts the same address"),
        ({"headless": True}, "--headless: the host with --node-rank 0 leads and serves"),
        ({"size": 3}, "--nnodes 4 cannot be divided among --data-parallel-size 3 replicas: use a multiple"),
        ({"size": 1}, r"--nnodes 4 is more than the layout needs: a replica has 2 ranks; lower --nnodes, or raise"),
        ({"data_parallel_size_local": 1}, "but --data-parallel-size-local places whole replicas on hosts"),
        ({"data_parallel_address": "127.0.0.1"}, "but --data-parallel-address places whole replicas on hosts"),
    ],
)
def test_options_of_nodes_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        deployment(**{"size": 2, **NODES, **options})
