"""What NCCL's log says about the way of tensors."""

import pytest

from shoal.doctor import nccl_log
from support import nccl_logs


@pytest.mark.parametrize(
    ("log", "ways", "between_hosts", "network", "devices"),
    [
        (nccl_logs.SOCKETS, {"Socket": 4}, "Socket", "Socket", ("eth0", "eth1")),
        (nccl_logs.ROCE_WITHOUT_GPUDIRECT, {"IB": 2}, "IB", "IB", ("mlx5_0", "mlx5_1")),
        (nccl_logs.GPUDIRECT, {"GDRDMA": 3, "P2P": 2}, "GDRDMA", "IB", ("mlx5_0", "mlx5_3")),
        (nccl_logs.EFA, {"GDRDMA": 1, "P2P": 1}, "GDRDMA", "AWS Libfabric", ()),
        (nccl_logs.PLUGIN, {"IB": 1}, "IB", "IBext_v8", ()),
        (nccl_logs.ONE_HOST, {"P2P": 2, "SHM": 1}, "", "", ()),
        (nccl_logs.OLD, {"SHM": 1}, "", "", ()),
        (nccl_logs.DISABLED, {}, "", "Socket", ("lo",)),
        ("", {}, "", "", ()),
    ],
)
def test_logs_are_classified(
    log: str, ways: dict[str, int], between_hosts: str, network: str, devices: tuple[str, ...]
) -> None:
    found = nccl_log.classify(log)
    assert dict(found.ways) == ways
    assert (found.between_hosts, found.network, found.devices) == (between_hosts, network, devices)


def test_the_slowest_way_counts() -> None:
    assert nccl_log.classify(nccl_logs.GPUDIRECT + nccl_logs.SOCKETS).between_hosts == "Socket"
    assert nccl_log.classify(nccl_logs.GPUDIRECT + nccl_logs.PLUGIN).between_hosts == "IB"


def test_why_there_is_no_rdma() -> None:
    assert nccl_log.classify(nccl_logs.SOCKETS).no_rdma
    assert nccl_log.classify(nccl_logs.DISABLED).rdma_disabled
    assert not nccl_log.classify(nccl_logs.GPUDIRECT).no_rdma
    assert nccl_log.classify(nccl_logs.ROCE_WITHOUT_GPUDIRECT).gdr_disabled == ("mlx5_0", "mlx5_1")


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (nccl_logs.SOCKETS, "network Socket on eth0, eth1; no RDMA device found"),
        (nccl_logs.DISABLED, "network Socket on lo; NCCL_IB_DISABLE=1"),
        (nccl_logs.ROCE_WITHOUT_GPUDIRECT, "network IB on mlx5_0, mlx5_1; no GPUDirect on mlx5_0, mlx5_1"),
        (nccl_logs.GPUDIRECT, "network IB on mlx5_0, mlx5_3"),
        (nccl_logs.ONE_HOST, ""),
    ],
)
def test_the_reason_is_a_text(log: str, reason: str) -> None:
    assert nccl_log.classify(log).reason == reason


def test_warnings_are_kept() -> None:
    (words,) = nccl_log.classify(nccl_logs.OLD).warnings
    assert words == "Call to posix_fallocate failed : No space left on device"
