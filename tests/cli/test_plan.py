"""`shoal plan` prints the plan of a run as text or JSON, and starts nothing."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from shoal.cli.commands import cli
from shoal.cli.plan import plans_of
from shoal.errors import ConfigError
from shoal.launch import launchers
from shoal.launch.open_model import open_model
from shoal.wire.topology import ClusterTopology, HostPair, HostTopology, pretty_document

Checkpoint = Callable[[str], Path]

LAYOUT = ("-tp", "2", "-pp", "2", "-dp", "2")
CACHE = ("--kv-cache-memory-bytes", "2MiB")


def run(*arguments: str) -> str:
    done = CliRunner().invoke(cli, ["plan", *arguments], catch_exceptions=False, standalone_mode=False)
    return done.stdout


def test_the_json_has_every_rank_of_every_replica(checkpoint: Checkpoint) -> None:
    told = json.loads(run(str(checkpoint("llama")), *LAYOUT, *CACHE, "--json"))
    assert [replica["place"]["rank"] for replica in told["replicas"]] == [0, 1]
    for replica in told["replicas"]:
        assert replica["layout"]["stages"] == [2, 1]
        assert [rank["shard"]["layers"] for rank in replica["ranks"]] == [[0, 2], [0, 2], [2, 3], [2, 3]]
        assert all(rank["weight_bytes"] > 0 and rank["kv_budget"] == 2**21 for rank in replica["ranks"])
        smallest = min(2**21 // rank["block_bytes"] for rank in replica["ranks"])
        assert replica["num_blocks"] == smallest
        assert "key" not in replica["place"]


def test_the_text_has_the_numbers_and_the_reasons(checkpoint: Checkpoint) -> None:
    told = run(str(checkpoint("llama")), *LAYOUT, *CACHE)
    first, cache, *_ = told.splitlines()
    assert first.endswith(": tp 2 x pp 2 x dp 2 = 8 ranks, float32, executor mp, up to 256 tokens per request")
    assert "tokens per replica, " in cache
    assert told.count("replica ") >= 2
    assert "- 2 stages of 2,1 layers: so that they cost about the same" in told


def test_experts_are_counted_by_rank(checkpoint: Checkpoint) -> None:
    told = json.loads(run(str(checkpoint("mixtral")), "-dp", "2", "--enable-expert-parallel", *CACHE, "--json"))
    held = [rank["shard"]["experts"] for replica in told["replicas"] for rank in replica["ranks"]]
    assert sorted(expert for each in held for expert in each) == list(range(sum(map(len, held))))


def test_the_printed_plan_is_the_one_that_replicas_get(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(launchers, "EngineProcess", lambda module, plan, **_: started.append(plan))
    opened = open_model(
        str(checkpoint("llama")), {"data_parallel_size": 2, "kv_cache_memory_bytes": 2**21}, online=True
    )
    launch = launchers.ProcessLauncher(opened, range(2))
    for number in range(2):
        launch(number)
    assert started == plans_of(opened)


def test_a_plan_that_does_not_fit_is_refused_as_by_serve(checkpoint: Checkpoint) -> None:
    with pytest.raises(Exception, match="too small for rank 0"):
        run(str(checkpoint("llama")), "--device-memory", "1MiB")


def test_the_plan_over_hosts_says_what_crosses_them_and_what_would_be_less(checkpoint: Checkpoint) -> None:
    told = run(str(checkpoint("llama")), "-tp", "2", "--nnodes", "2", *CACHE)
    assert "- ranks 0 on " in told
    assert "- between hosts: 3.50 KiB per token in 7 exchanges per step" in told
    assert "with --tensor-parallel-size 1 --pipeline-parallel-size 2 it would be 256 bytes per token" in told
    told = run(str(checkpoint("llama")), "-pp", "2", "--nnodes", "2", *CACHE)
    assert "- between hosts: 256 bytes per token in 1 exchange per step" in told
    assert "warning: tensor-parallel" not in told


def topology_file(folder: Path, hosts: int = 4) -> str:
    """Write a topology of hosts of which h0 and h2 have a fast link, and h1 and h3 have another one."""
    pairs = itertools.permutations(range(hosts), 2)
    found = ClusterTopology(
        hosts=tuple(HostTopology(name=f"h{i}", rank=i, address=f"10.0.0.{i}") for i in range(hosts)),
        pairs=tuple(
            HostPair(source=i, target=j, latency_us=10.0, bandwidth=1e10)
            if i % 2 == j % 2
            else HostPair(source=i, target=j, latency_us=900.0, bandwidth=1e8)
            for i, j in pairs
        ),
    )
    file = folder / "topology.json"
    file.write_text(pretty_document(found))
    return str(file)


def test_the_plan_says_what_the_topology_has_changed(checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = topology_file(tmp_path)
    flags = ("-tp", "4", "-pp", "2", "--nnodes", "4", "--max-num-seqs", "16", *CACHE)
    told = run(str(checkpoint("llama")), *flags, "--num-devices", "2", "--topology", file)
    assert (
        f"- --topology {file}: 6 links between the hosts of a replica, with 900 us, 100 MB/s to 10 us, 10000 MB/s"
        in told
    )
    assert "- the measured links put the hosts into the order h0 (10.0.0.0), h2 (10.0.0.2), h1 (10.0.0.1), h3" in told
    assert "- ranks 0-1 on h0 (10.0.0.0), 4-5 on h1 (10.0.0.1), 2-3 on h2 (10.0.0.2), 6-7 on h3 (10.0.0.3): " in told
    assert "for 16 tokens on the measured links; with --tensor-parallel-size 2 --pipeline-parallel-size 4" not in told


@pytest.mark.parametrize(
    ("hosts", "flags", "message"),
    [
        (1, ("--nnodes", "2", "-pp", "2"), "has 1 host, but a replica has 2: run `shoal doctor --output FILE` on all"),
        (2, (), r"is of other hosts: it has h0 \(10.0.0.0\), h1 \(10.0.0.1\), and this replica runs on "),
        (2, ("--measure-links",), "has measured links, and --measure-links measures them again: leave one of them out"),
    ],
)
def test_a_topology_that_does_not_fit_is_refused(
    checkpoint: Checkpoint, tmp_path: Path, hosts: int, flags: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(str(checkpoint("llama")), *flags, "--topology", topology_file(tmp_path, hosts))


def test_links_are_measured_when_the_hosts_have_come(checkpoint: Checkpoint) -> None:
    folder = str(checkpoint("llama"))
    told = run(folder, "-pp", "2", "--nnodes", "2", "--measure-links", *CACHE)
    assert "- --measure-links: the links are measured when the hosts have come, and may change this" in told
    assert "warning: --measure-links changes nothing: the replica has one host" in run(
        folder, "--measure-links", *CACHE
    )
