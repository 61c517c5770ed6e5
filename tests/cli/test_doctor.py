"""`shoal doctor` on a healthy host and on broken set-ups, as users call it."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoal.wire.topology import read_topology
from support import gpu_outputs
from support.gpus import pose_as_host_with
from support.hosts import free_port

pytestmark = pytest.mark.slow  # the tools of vendors are started, where there are any

Shoal = Callable[..., int]
Captured = pytest.CaptureFixture[str]


def findings(text: str) -> dict[str, dict[str, Any]]:
    """Return the worst finding of each kind, from the output of --json."""
    order = ("ok", "warning", "failure")
    worst: dict[str, dict[str, Any]] = {}
    for each in json.loads(text)["findings"]:
        before = worst.get(each["kind"], each)
        worst[each["kind"]] = max(before, each, key=lambda one: order.index(one["level"]))
    return worst


def test_a_healthy_host(shoal: Shoal, capsys: Captured, tmp_path: Path) -> None:
    file = tmp_path / "topology.json"
    assert shoal("doctor", "bundled", "--json", "--output", file) == 0
    out = capsys.readouterr().out
    found = findings(out)
    for kind in ("python-version", "torch", "loopback", "all-reduce", "model-fit"):
        assert found[kind]["level"] == "ok", kind
    assert "check-failed" not in found
    (host,) = read_topology(file.read_bytes()).hosts
    assert {each.backend: each.ranks for each in host.all_reduce} == {"shm": 2, "gloo": 2, "threads": 2}
    assert all(each.latency_us > 0 and each.bandwidth > 0 for each in host.all_reduce)
    assert json.loads(out)["topology"]["hosts"][0]["name"] == host.name == socket.gethostname()


def test_the_report_for_people(shoal: Shoal, capsys: Captured) -> None:
    assert shoal("doctor", "bundled", "--ranks", 0) == 0
    out = capsys.readouterr().out
    assert "ok      Python: Python 3." in out
    assert "ok      Memory for the model: bundled fits at tp 1 x pp 1" in out
    assert f"host 0: {socket.gethostname()}" in out
    assert out.splitlines()[-1].endswith(", 0 failures")


@pytest.mark.parametrize(
    ("variable", "words"),
    [("", "hides all 8 GPUs"), ("7,8,0", "there is no GPU '8'"), ("9", "hides all 8 GPUs: there is no GPU '9'")],
)
def test_gpus_that_are_hidden(
    shoal: Shoal, capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, words: str
) -> None:
    pose_as_host_with(gpu_outputs.DGX_QUERY, tmp_path, monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert shoal("doctor", "--ranks", 0, "--json") == 1
    found = findings(capsys.readouterr().out)["visible-devices"]
    assert (found["level"], words in found["text"]) == ("failure", True)
    assert found["mend"].startswith("unset CUDA_VISIBLE_DEVICES")


def test_a_port_that_is_taken(shoal: Shoal, capsys: Captured) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        hosts = ("--nnodes", 2, "--master-addr", "127.0.0.1", "--master-port", port, "--timeout", 1)
        assert shoal("doctor", "--ranks", 0, "--json", *hosts) == 1
    found = findings(capsys.readouterr().out)
    assert (found["port"]["level"], found["hosts"]["level"]) == ("failure", "failure")
    assert f"port {port} is taken" in found["port"]["text"]
    assert found["loopback"]["level"] == "ok", "the other checks were made"


def test_an_address_of_another_host(shoal: Shoal, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_CLUSTER_KEY", "key")
    assert shoal("doctor", "--ranks", 0, "--json", "--nnodes", 2, "--master-addr", "203.0.113.7", "--timeout", 1) == 1
    found = findings(capsys.readouterr().out)["master-address"]
    assert (found["level"], "203.0.113.7 is no address of this host" in found["text"]) == ("failure", True)


def test_hosts_that_do_not_come(shoal: Shoal, capsys: Captured) -> None:
    hosts = ("--nnodes", 2, "--master-addr", "127.0.0.1", "--master-port", free_port(), "--timeout", 1)
    assert shoal("doctor", "--ranks", 0, "--json", *hosts) == 1
    found = findings(capsys.readouterr().out)
    assert "rank 1 missing" in found["hosts"]["text"]
    assert (found["port"]["level"], found["master-address"]["level"]) == ("ok", "warning")


def test_a_model_that_fits_nowhere(shoal: Shoal, capsys: Captured, tmp_path: Path) -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 65536, "vocab_size": 128000}
    config |= {"intermediate_size": 262144, "num_hidden_layers": 200, "num_attention_heads": 512}
    config |= {"num_key_value_heads": 512, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert shoal("doctor", tmp_path, "--ranks", 0, "--json") == 1
    found = findings(capsys.readouterr().out)["model-fit"]
    assert (found["level"], "fits on this host in no layout" in found["text"]) == ("failure", True)


@pytest.mark.parametrize(
    ("before", "kind", "words"),
    [
        ("ulimit -n 256", "open-files", "at most 256 files may be open"),
        ("mount -t tmpfs -o size=1m shm /dev/shm", "shared-memory", "1.00 MiB are free"),
    ],
)
def test_limits_that_are_too_low(before: str, kind: str, words: str) -> None:
    command = f"{before} && exec {sys.executable} -m shoal doctor --json --ranks 0"
    inside = ["unshare", "--mount"] if os.geteuid() == 0 else []
    if "mount" in before and subprocess.run([*inside, "sh", "-c", before], check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    done = subprocess.run([*inside, "sh", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    found = findings(done.stdout)[kind]
    assert (found["level"], words in found["text"]) == ("failure", True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--nnodes", "2", "--node-rank", "2", "--master-addr", "10.0.0.1"), "--node-rank 2 of --nnodes 2"),
        (("--nnodes", "2"), "needs --master-addr"),
        (("--master-addr", "10.0.0.1"), "no effect on one host"),
        (("--nnodes", "2", "--master-addr", "10.0.0.1"), "there is no shared key"),
        (("--nnodes", "2", "--master-addr", "10.0.0.1", "--ray"), "--ray examines all nodes of the cluster: leave out"),
        (("--ray-address", "10.0.0.1:6379"), "--ray-address has no effect without --ray"),
        (("--ranks", "0", "--output", "/no/such/folder/file"), "cannot be written"),
    ],
)
def test_flags_that_do_not_go_together(
    shoal: Shoal, capsys: Captured, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], words: str
) -> None:
    monkeypatch.delenv("SHOAL_CLUSTER_KEY", raising=False)
    assert shoal("doctor", *arguments) == 2
    assert words in capsys.readouterr().err


def test_ray_that_is_not_installed(shoal: Shoal, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert shoal("doctor", "--ray") == 2
    assert capsys.readouterr().err == "error: --ray: it needs Ray: pip install 'shoal[ray]'\n"


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
@pytest.mark.skipif(Path("/tmp/ray/ray_current_cluster").exists(), reason="somebody has started Ray on this host")
def test_a_host_without_a_ray_cluster(shoal: Shoal, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert shoal("doctor", "--ray") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --ray: no Ray cluster runs on this host; start Ray with `ray start`, or give the")


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_a_ray_cluster_that_does_not_answer(shoal: Shoal, capsys: Captured) -> None:
    assert shoal("doctor", "--ray", "--ray-address", f"127.0.0.1:{free_port()}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no answer (Connection refused)" in line
