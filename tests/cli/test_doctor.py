"""`shoal doctor` on this host, as text and JSON, and with broken set-ups."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoal.wire.topology import read_topology

Shoal = Callable[..., int]


def findings(told: dict[str, Any]) -> dict[str, str]:
    """Return the worst level of each kind of finding."""
    order = ("ok", "warning", "failure")
    worst: dict[str, str] = {}
    for each in told["findings"]:
        worst[each["kind"]] = max(worst.get(each["kind"], "ok"), each["level"], key=order.index)
    return worst


@pytest.mark.slow
def test_a_healthy_host(shoal: Shoal, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "topology.json"
    assert shoal("doctor", "bundled", "--json", "--output", file) == 0
    told = json.loads(capsys.readouterr().out)
    found = findings(told)
    for kind in ("python-version", "torch", "loopback", "all-reduce", "model-fit", "shared-memory", "open-files"):
        assert found[kind] == "ok", kind
    assert "check-failed" not in found
    assert {each["backend"] for each in told["topology"]["hosts"][0]["all_reduce"]} == {"gloo", "threads"}
    (host,) = read_topology(file.read_bytes()).hosts
    assert host.cores
    assert host.memory
    assert all(speed.latency_us > 0 and speed.bandwidth > 0 for speed in host.all_reduce)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--nnodes", "2", "--node-rank", "2", "--master-addr", "10.0.0.1"), "--node-rank 2 of --nnodes 2"),
        (("--nnodes", "2"), "needs --master-addr"),
        (("--master-addr", "10.0.0.1"), "no effect on one host"),
    ],
)
def test_flags_that_do_not_go_together(
    shoal: Shoal, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    assert shoal("doctor", *arguments) == 2
    assert words in capsys.readouterr().err
