"""What several hosts must have in common, with made-up examinations."""

from typing import Any

import pytest

from shoal.doctor import compare
from shoal.wire.doctor import Finding, HostExamination
from shoal.wire.topology import AllReduceSpeed, Device, HostPair, HostTopology, Interface, RdmaPort, with_fields


def host(rank: int, **changes: Any) -> HostTopology:
    address = f"10.0.0.{rank + 1}"
    fields: dict[str, Any] = {
        "name": f"node{rank}",
        "rank": rank,
        "address": address,
        "machine": f"boot-{rank}",
        "cores": tuple(range(8)),
        "interfaces": (
            Interface(name="lo", addresses=("127.0.0.1", "::1")),
            Interface(name="eth0", addresses=(address, "fe80::1"), mtu=1500, speed=1.25e9),
            Interface(name="docker0", addresses=("172.17.0.1",)),
        ),
    }
    return HostTopology(**{**fields, **changes})


def examined(rank: int, topology: HostTopology | None = None, **fields: Any) -> HostExamination:
    return HostExamination(topology=topology or host(rank), **fields)


def only(findings: list[Finding]) -> Finding:
    (finding,) = findings
    return finding


def test_equal_hosts() -> None:
    same: dict[str, Any] = {
        "versions": {"Shoal": "1", "PyTorch": "2"},
        "variables": {"NCCL_DEBUG": "INFO"},
        "model": {"config.json": "ab"},
    }
    pairs = [
        HostPair(source=a, target=b, latency_us=50, bandwidth=1e9, clock_offset_s=0.001) for a, b in ((0, 1), (1, 0))
    ]
    found = compare.check([examined(0, **same), examined(1, **same)], pairs, [])
    assert {each.level for each in found} == {"ok"}
    assert [each.kind for each in found] == [
        *("double-address", "versions", "variables-differ", "model-files", "devices-differ", "mtu"),
        *("connection", "slow-pair", "clock-skew", "transport"),
    ]


def test_a_double_address() -> None:
    twice = (Interface(name="eth1", addresses=("10.9.9.9",)),)
    found = only(compare.check_addresses([host(0, interfaces=twice), host(1, interfaces=twice)]))
    assert (found.level, "host 0 (node0) and host 1 (node1) both have 10.9.9.9" in found.text) == ("warning", True)
    used = [host(rank, interfaces=twice, address="10.9.9.9") for rank in range(2)]
    assert only(compare.check_addresses(used)).level == "failure"


def test_the_same_machine_twice() -> None:
    first = host(0)
    found = only(compare.check_addresses([first, with_fields(first, rank=1)]))
    assert (found.level, "they are the same machine" in found.text) == ("failure", True)


def test_hosts_with_the_same_name() -> None:
    found = only(compare.check_addresses([host(0), host(1, name="node0")]))
    assert (found.level, found.text) == ("warning", "2 hosts are called node0")


@pytest.mark.parametrize(
    ("name", "level"), [("Shoal", "failure"), ("wire version", "failure"), ("PyTorch", "warning"), ("NCCL", "warning")]
)
def test_hosts_with_different_versions(name: str, level: str) -> None:
    found = only(compare.check_versions([examined(0, versions={name: "1"}), examined(1, versions={name: "2"})]))
    assert (found.level, found.text) == (level, f"{name}: 1 on host 0 (node0); 2 on host 1 (node1)")


def test_a_version_that_one_host_does_not_have() -> None:
    found = only(compare.check_versions([examined(0, versions={"CUDA": "12.8"}), examined(1)]))
    assert found.text == "CUDA: 12.8 on host 0 (node0); none on host 1 (node1)"


def test_hosts_with_different_variables() -> None:
    first = examined(0, variables={"NCCL_IB_HCA": "mlx5", "CUDA_VISIBLE_DEVICES": "0", "SHOAL_DP_RANK": "0"})
    second = examined(1, variables={"CUDA_VISIBLE_DEVICES": "1", "SHOAL_DP_RANK": "1"})
    found = only(compare.check_variables([first, second]))
    assert (found.level, found.text) == ("warning", "NCCL_IB_HCA: mlx5 on host 0 (node0); none on host 1 (node1)")


def test_hosts_with_different_files_of_the_model() -> None:
    files = [examined(rank, model={"config.json": "ab", "set of weights": digest}) for rank, digest in enumerate("xy")]
    found = only(compare.check_models(files))
    assert (found.level, found.text) == ("failure", "set of weights: x on host 0 (node0); y on host 1 (node1)")
    assert compare.check_models([files[0], examined(1)]) == [], "the other host has a finding about its model"


def test_hosts_with_different_devices() -> None:
    gpus = host(0, devices=(Device(index=0, name="H100"), Device(index=1, name="H100")))
    found = only(compare.check_devices([gpus, host(1)]))
    assert (found.level, found.text) == ("warning", "2 x H100 on host 0 (node0); 8 cores on host 1 (node1)")


def test_hosts_with_different_mtus() -> None:
    jumbo = host(1, interfaces=(Interface(name="ens1", addresses=("10.0.0.2",), mtu=9000),))
    found = only(compare.check_mtu([host(0), jumbo]))
    assert found.text == "1500 on eth0 of host 0 (node0), 9000 on ens1 of host 1 (node1)"


def pairs(speeds: dict[tuple[int, int], float], latency: float = 50.0) -> list[HostPair]:
    return [HostPair(source=a, target=b, latency_us=latency, bandwidth=speed) for (a, b), speed in speeds.items()]


ALL = {(a, b): 1e9 for a in range(3) for b in range(3) if a != b}


def test_the_slowest_pair_is_named() -> None:
    hosts = [host(rank) for rank in range(3)]
    connected, slow = compare.check_connections(hosts, pairs({**ALL, (2, 1): 4e8}))
    assert (connected.kind, connected.level, slow.kind, slow.level) == ("connection", "ok", "slow-pair", "warning")
    assert slow.text.startswith("least bandwidth: host 2 (node2) to host 1 (node1), 381.47 MiB/s; ")
    _, fine = compare.check_connections(hosts, pairs({**ALL, (2, 1): 6e8}))
    assert fine.level == "ok"


def test_all_pairs_may_be_slower_than_their_interface() -> None:
    _, slow = compare.check_connections([host(rank) for rank in range(3)], pairs(dict.fromkeys(ALL, 3e8)))
    assert (slow.level, "the interface has 10 Gbit/s" in slow.text) == ("warning", True)


def test_hosts_that_are_not_connected() -> None:
    broken = HostPair(source=1, target=0, error="no connection to 10.0.0.1:4242: timed out")
    found = only(compare.check_connections([host(0), host(1)], [broken]))
    assert (found.kind, found.level) == ("connection", "failure")
    assert found.text == "host 1 (node1) to host 0 (node0): no connection to 10.0.0.1:4242: timed out"


@pytest.mark.parametrize(
    ("offset", "level", "words"),
    [
        (0.4, "ok", "400.00 ms ahead of that of host 0"),
        (-0.6, "warning", "600.00 ms behind"),
        (31.0, "failure", "the clock of host 1 (node1) is 31.0 s ahead"),
    ],
)
def test_clocks(offset: float, level: str, words: str) -> None:
    measured = [
        HostPair(source=0, target=1, clock_offset_s=offset),
        HostPair(source=1, target=0, clock_offset_s=-offset),
    ]
    found = only(compare.check_clocks([host(0), host(1)], measured))
    assert (found.level, words in found.text) == (level, True)


RDMA = (RdmaPort(device="mlx5_0", port=1, active=True),)


@pytest.mark.parametrize(
    ("path", "rdma", "level", "words"),
    [
        ("", (), "ok", "NCCL was not tried"),
        ("Socket", (), "ok", "not every host has an active RDMA port"),
        ("Socket", RDMA, "warning", "although every host has an active RDMA port"),
        ("IB", RDMA, "warning", "without GPUDirect"),
        ("GDRDMA", RDMA, "ok", "NCCL uses GDRDMA"),
    ],
)
def test_the_way_between_hosts(path: str, rdma: tuple[RdmaPort, ...], level: str, words: str) -> None:
    speeds = [AllReduceSpeed(backend="nccl", ranks=2, latency_us=30, bandwidth=1e10, path=path)] if path else []
    found = only(compare.check_transport([host(rank, rdma=rdma) for rank in range(2)], speeds))
    assert (found.level, words in found.text) == (level, True)


def test_the_slowest_host_counts_in_an_all_reduce() -> None:
    found = compare.slowest_speeds(
        [
            AllReduceSpeed(backend="nccl", ranks=2, latency_us=30, bandwidth=2e10, path="GDRDMA"),
            AllReduceSpeed(backend="nccl", ranks=2, latency_us=40, bandwidth=1e10, path="Socket"),
            AllReduceSpeed(backend="gloo", ranks=2, latency_us=90, bandwidth=1e9),
        ]
    )
    assert found == (
        AllReduceSpeed(backend="gloo", ranks=2, latency_us=90, bandwidth=1e9),
        AllReduceSpeed(backend="nccl", ranks=2, latency_us=40, bandwidth=1e10, path="GDRDMA and Socket"),
    )


def test_hosts_that_do_not_answer() -> None:
    found = only(compare.check_arrived([0, 2], range(4), "examination"))
    assert (found.kind, found.level, "--node-rank 1, 3" in found.text) == ("hosts", "failure", True)
