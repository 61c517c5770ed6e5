"""Which replicas are where, and the combinations of options that mean nothing."""

import socket
from typing import Any

import pytest

from shoal.config.engine_options import EngineOptions
from shoal.errors import ConfigError
from shoal.launch.deployment import DEFAULT_PORT, Deployment, Mode

THERE: dict[str, Any] = {"data_parallel_address": "127.0.0.1"}


def deployment(size: int = 4, **options: Any) -> Deployment:
    names = {"rank": "data_parallel_rank", "start": "data_parallel_start_rank", "local": "data_parallel_size_local"}
    names["hybrid"] = "data_parallel_hybrid_lb"
    given = {names.get(name, name): value for name, value in options.items()}
    return Deployment.of(EngineOptions.from_flat(None, {"data_parallel_size": size, **given}))


def test_without_a_word_all_are_here() -> None:
    found = deployment()
    assert (found.mode, list(found.local), list(found.awaited)) == (Mode.ALONE, [0, 1, 2, 3], [])
    assert not found.listens
    assert found.place.size == 1, "the plan is for all of them"


@pytest.mark.parametrize("options", [{"local": 4, **THERE}, {"hybrid": True, **THERE}])
def test_one_host_that_has_all_awaits_nobody(options: dict[str, Any]) -> None:
    found = deployment(**options)
    assert (found.mode, list(found.local), found.listens) == (Mode.ALONE, [0, 1, 2, 3], False)


def test_a_front_end_awaits_what_is_not_here() -> None:
    found = deployment(local=1, data_parallel_rpc_port=4242, **THERE)
    assert (found.mode, list(found.local), list(found.awaited)) == (Mode.HEAD, [0], [1, 2, 3])
    assert found.listens
    assert str(found.address) == "127.0.0.1:4242"
    assert found.place.local_size == 1


def test_a_front_end_may_have_none() -> None:
    found = deployment(local=0, **THERE)
    assert (list(found.local), list(found.awaited), found.listens) == ([], [0, 1, 2, 3], True)
    assert (found.place.size, found.place.local_size, list(found.elsewhere)) == (4, 0, [])
    assert str(found.address) == f"127.0.0.1:{DEFAULT_PORT}"
    assert deployment(1, local=0, **THERE).mode is Mode.HEAD


def test_an_address_may_be_of_ipv6() -> None:
    for given in ("fd02::1", "[fd02::1]"):
        with pytest.raises(ConfigError, match="fd02::1 is reached from other hosts, and there is no shared key"):
            deployment(local=1, data_parallel_address=given)
    assert str(deployment(local=1, data_parallel_address="::1").address) == f"[::1]:{DEFAULT_PORT}"
    with pytest.raises(ConfigError, match="--data-parallel-address takes the name or the address of a host, without a"):
        deployment(local=1, data_parallel_address="127.0.0.1:29550")


@pytest.mark.parametrize("options", [{"local": 1}, {"rank": 1}, {"headless": True, "start": 1}])
def test_a_name_that_leads_to_the_loopback_is_refused(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of Debian's /etc/hosts do for the host itself: nobody else would come there."""
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *more, **named: real("127.0.1.1", *more, **named))
    with pytest.raises(ConfigError, match=r"--data-parallel-address head is 127\.0\.1\.1 on this host .*, a loopback"):
        deployment(data_parallel_address="head", **options)


def test_a_headless_host_has_the_rest_unless_it_says_how_many() -> None:
    found = deployment(headless=True, start=1, **THERE)
    assert (found.mode, list(found.local), found.listens) == (Mode.HEADLESS, [1, 2, 3], False)
    assert list(deployment(headless=True, start=1, local=2, **THERE).local) == [1, 2]
    assert list(deployment(headless=True, rank=2, **THERE).local) == [2]
    assert list(deployment(1, headless=True, **THERE).local) == [0]
    assert deployment(headless=True, start=0, **THERE).mode is Mode.HEADLESS, "the front end has none"


def test_peers_meet_where_replica_0_is() -> None:
    assert [deployment(rank=number, **THERE).listens for number in range(3)] == [True, False, False]
    second = deployment(hybrid=True, start=2, local=2, **THERE)
    assert (second.mode, list(second.local), list(second.awaited), second.listens) == (Mode.PEERS, [2, 3], [], False)
    assert (second.place.rank, second.place.size, second.place.local_size) == (2, 4, 2)
    assert list(second.elsewhere) == [0, 1]
    assert deployment(hybrid=True, local=2, **THERE).listens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"headless": True, "start": 3, "local": 2},
            "3 and --data-parallel-size-local 2 reach up to replica 4, .* is 4",
        ),
        ({"local": 5}, "0 and --data-parallel-size-local 5 reach up to replica 4, --data-parallel-size is 4"),
        ({"headless": True, "start": 4}, "--data-parallel-start-rank 4 of --data-parallel-size 4 does not exist"),
        ({"rank": 4}, "--data-parallel-rank 4 of --data-parallel-size 4 does not exist"),
        ({"headless": True}, "say which of the 4 replicas run here"),
        ({"headless": True, "start": 0, "local": 0}, "--data-parallel-size-local 0: nothing is left to do here"),
        ({"hybrid": True, "local": 0}, "--data-parallel-size-local 0: nothing is left to do here"),
        ({"hybrid": True, "rank": 1}, "--data-parallel-rank 1 serves one replica, --data-parallel-hybrid-lb all"),
        ({"hybrid": True, "headless": True}, "--headless serves nothing, --data-parallel-hybrid-lb serves"),
        ({"rank": 1, "start": 2}, "--data-parallel-rank 1 and --data-parallel-start-rank 2: leave one out"),
        ({"rank": 1, "local": 2}, "--data-parallel-rank 1 is one replica, --data-parallel-size-local says 2"),
        ({"start": 2, "local": 2}, "--data-parallel-start-rank 2: say too whether"),
        ({"local": 1, "distributed_executor_backend": "threads"}, "replicas on several hosts are processes"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        deployment(**options, **THERE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"headless": True, "start": 2}, "the front end of the 4 replicas is elsewhere, .* that serves$"),
        ({"local": 1}, "1 of 4 replicas are here, the others elsewhere, .* that serves$"),
        ({"rank": 1}, "1 of 4 replicas are here, .* --data-parallel-address, .* that has replica 0$"),
    ],
)
def test_without_an_address_nobody_meets(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        deployment(**options)


def test_other_hosts_need_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHOAL_CLUSTER_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1 is reached from other hosts, and there is no shared key"):
        deployment(rank=1, data_parallel_address="192.0.2.1")
    monkeypatch.setenv("SHOAL_CLUSTER_KEY", "secret")
    assert deployment(rank=1, data_parallel_address="192.0.2.1").key == "secret"
