"""The doctors of two hosts, which are network namespaces."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shoal.wire.topology import read_topology
from support import hosts

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(hosts.obstacle()), reason=hosts.obstacle() or "no obstacle")]


def test_two_hosts(tmp_path: Path) -> None:
    with hosts.two_hosts() as pair:
        programs = [
            subprocess.Popen(
                [
                    *host.inside,
                    sys.executable,
                    "-m",
                    "shoal",
                    "doctor",
                    "bundled",
                    "--json",
                    "--nnodes",
                    "2",
                    "--ranks",
                    "0",
                ]
                + ["--node-rank", str(rank), "--master-addr", pair[0].address, "--output", str(tmp_path / str(rank))],
                env={**os.environ, "SHOAL_CLUSTER_KEY": "key", "NCCL_IB_HCA": f"mlx5_{rank}"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank, host in enumerate(pair)
        ]
        told = [program.communicate(timeout=110) for program in programs]
    for program, (out, log) in zip(programs, told, strict=True):
        failed = [each["text"] for each in json.loads(out)["findings"] if each["level"] == "failure"]
        assert (program.returncode, failed) == (0, []), log
    first, second = ([each for each in json.loads(out)["findings"] if each["host"] == "all hosts"] for out, _ in told)
    found: dict[str, dict[str, Any]] = {each["kind"]: each for each in first}
    assert {each["kind"]: each["level"] for each in second} == {kind: each["level"] for kind, each in found.items()}
    for kind in (
        "hosts",
        "all-reduce",
        "versions",
        "model-files",
        "connection",
        "clock-skew",
        "transport",
        "mtu",
        "model-fit",
    ):
        assert found[kind]["level"] == "ok", kind
    assert "gloo over 2 hosts" in found["all-reduce"]["text"]
    assert found["variables-differ"]["text"].startswith("NCCL_IB_HCA: mlx5_0 on host 0")
    assert found["model-fit"]["text"].endswith(" over all hosts together")
    topology = read_topology((tmp_path / "0").read_bytes())
    assert [host.address for host in topology.hosts] == [host.address for host in pair]
    assert {(each.source, each.target) for each in topology.pairs} == {(0, 1), (1, 0)}
    assert all(each.bandwidth and each.latency_us for each in topology.pairs)
    assert [each.backend for each in topology.all_reduce] == ["gloo"]
