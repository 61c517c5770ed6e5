"""The file of a measured topology: it is read as it was written, and by programs of other versions."""

import json

import msgspec
import pytest

from shoal.errors import ConfigError
from shoal.wire.topology import (
    TOPOLOGY_VERSION,
    AllReduceSpeed,
    ClusterTopology,
    Device,
    DeviceLink,
    HostPair,
    HostTopology,
    Interface,
    NumaNode,
    RdmaPort,
    pretty_document,
    read_topology,
)

SPEED = AllReduceSpeed(backend="nccl", ranks=2, latency_us=21.5, bandwidth=2e11, path="P2P")
HOST = HostTopology(
    name="node0",
    address="10.0.0.1",
    machine="boot",
    cores=(0, 1),
    memory=2**37,
    numa=(NumaNode(number=0, cores=(0, 1), memory=2**37, distances=(10,)),),
    devices=(Device(index=0, name="H100", uuid="GPU-1", bus="0000:1b:00.0", memory=2**36, numa=0),),
    links=(DeviceLink(first=0, second=1, kind="nvswitch", path="NV18", links=18, bandwidth=4.78e11),),
    interfaces=(Interface(name="ib0", addresses=("10.0.0.1",), mtu=4092, speed=5e10, rdma="mlx5_0", chosen=True),),
    rdma=(RdmaPort(device="mlx5_0", port=1, layer="InfiniBand", active=True, speed=5e10),),
    all_reduce=(SPEED,),
)
PAIR = HostPair(source=0, target=1, latency_us=12.5, bandwidth=3e9, clock_offset_s=-0.01)
TOPOLOGY = ClusterTopology(shoal="0.1.0", hosts=(HOST,), pairs=(PAIR,), all_reduce=(SPEED,), path="GDRDMA")


def test_a_topology_is_read_as_it_was_written() -> None:
    assert read_topology(pretty_document(TOPOLOGY).encode()) == TOPOLOGY


def test_keys_are_the_names_of_the_fields() -> None:
    told = json.loads(pretty_document(TOPOLOGY))
    assert told["version"] == TOPOLOGY_VERSION
    assert told["hosts"][0]["links"][0]["bandwidth"] == 4.78e11
    assert told["pairs"] == [
        {"source": 0, "target": 1, "latency_us": 12.5, "bandwidth": 3e9, "clock_offset_s": -0.01, "error": ""}
    ]


def test_fields_of_later_versions_are_ignored() -> None:
    told = json.loads(pretty_document(TOPOLOGY))
    told["hosts"][0]["new field"] = told["new field"] = 1
    assert read_topology(json.dumps(told).encode()) == TOPOLOGY


def test_a_later_version_is_refused() -> None:
    later = msgspec.structs.replace(TOPOLOGY, version=TOPOLOGY_VERSION + 1)
    with pytest.raises(ConfigError, match=f"has version {TOPOLOGY_VERSION + 1}"):
        read_topology(pretty_document(later).encode())


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b'{"hosts": 1}', b'{"hosts": [{}]}'])
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(ConfigError, match="this is no ClusterTopology"):
        read_topology(data)
