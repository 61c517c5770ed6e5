"""Tests of collective operations under vLLM's names: in a real job under torchrun, and in one process."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal import distributed
from shoal.errors import ConfigError
from support import hosts

JOB = """
import json, sys
import torch
import torch.distributed
from shoal import distributed as d

d.init_distributed_environment(timeout_s=120)
rank, size = d.get_tensor_model_parallel_rank(), d.get_tensor_model_parallel_world_size()
mine = torch.arange(6.0).view(2, 3) + 10 * rank
found = {
    "size": size,
    "reduced": d.tensor_model_parallel_all_reduce(mine.clone()).tolist(),
    "gathered": d.tensor_model_parallel_all_gather(mine).tolist(),
    "uneven": d.tensor_model_parallel_all_gather(mine[:, : rank + 1], dim=1).tolist(),
    "scattered": d.tensor_model_parallel_reduce_scatter(mine.clone()).tolist(),
    "rows": d.tensor_model_parallel_reduce_scatter(mine.clone(), dim=0).tolist(),
}
sent = {"t": torch.arange(4, dtype=torch.bfloat16), "n": [1, None, "x"], "empty": torch.zeros(0, 2)}
got = d.broadcast_tensor_dict(sent if rank == 1 else None, src=1)
found["dict"] = [got["t"].tolist(), str(got["t"].dtype), got["n"], list(got["empty"].shape)]
try:
    d.broadcast_tensor_dict({"no": object()} if rank == 0 else None)
except Exception as error:
    found["error"] = f"{type(error).__name__}: {error}"
x = torch.ones(1)
torch.distributed.all_reduce(x, group=d.get_process_group())
found["torch"] = x.item()
d.destroy_distributed_environment()

found["again"] = []
for turn in range(2):
    d.init_distributed_environment(timeout_s=60)
    x = torch.full((1,), float(turn + rank))
    torch.distributed.all_reduce(x, group=d.get_process_group())
    found["again"].append([d.tensor_model_parallel_all_reduce(torch.full((1,), float(turn + rank))).item(), x.item()])
    d.destroy_distributed_environment()
print("FOUND" + json.dumps([rank, found]), flush=True)
"""


def run_under_torchrun(job: Path, text: str) -> dict[int, Any]:
    """Run a job with two ranks, and return the results by rank."""
    job.write_text(text)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--log-dir", str(job.parent / "logs"), str(job)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    decoder = json.JSONDecoder()
    found = dict(decoder.raw_decode(part)[0] for part in done.stdout.split("FOUND")[1:])
    assert sorted(found) == [0, 1]
    return found


@pytest.mark.slow
def test_under_torchrun_and_started_again_over_one_store(tmp_path: Path) -> None:
    for rank, each in run_under_torchrun(tmp_path / "job.py", JOB).items():
        assert each["size"] == 2
        assert each["reduced"] == [[10, 12, 14], [16, 18, 20]]
        assert each["gathered"] == [[0, 1, 2, 10, 11, 12], [3, 4, 5, 13, 14, 15]]
        assert each["uneven"] == [[0, 10, 11], [3, 13, 14]]
        assert each["scattered"] == [[[10, 12], [16, 18]], [[14], [20]]][rank]
        assert each["rows"] == [[[10, 12, 14]], [[16, 18, 20]]][rank]
        assert each["dict"] == [[0, 1, 2, 3], "torch.bfloat16", [1, None, "x"], [0, 2]]
        assert "rank 0 passes no dictionary that can be sent" in each["error"]
        assert each["torch"] == 2
        assert each["again"] == [[1, 1], [3, 3]]


TWO_HOSTS = """
import os, socket
import torch
# torch's own group uses the address of the host's name, which is the same for both hosts here.
os.environ["GLOO_SOCKET_IFNAME"] = next(name for _, name in socket.if_nameindex() if name != "lo")
from shoal import distributed as d

d.init_distributed_environment(timeout_s=60)
print(d.tensor_model_parallel_all_reduce(torch.ones(1) + d.get_tensor_model_parallel_rank()).item())
d.destroy_distributed_environment()
"""


@pytest.mark.slow
@pytest.mark.skipif(bool(hosts.obstacle()), reason=hosts.obstacle())
def test_ranks_on_two_hosts() -> None:
    with hosts.two_hosts() as pair:
        common = {**os.environ, "MASTER_ADDR": pair[0].address, "MASTER_PORT": "29541", "WORLD_SIZE": "2"}
        processes = [
            subprocess.Popen(
                [*host.inside, sys.executable, "-c", TWO_HOSTS],
                env={**common, "RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank, host in enumerate(pair)
        ]
        try:
            texts = [process.communicate(timeout=240) for process in processes]
        finally:
            for process in processes:
                process.kill()
    assert [out for out, _ in texts] == ["3.0\n"] * 2, texts


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    distributed.init_distributed_environment(1, 0, f"file://{tmp_path / 'store'}", backend="gloo", timeout_s=60)
    yield
    distributed.destroy_distributed_environment()


@pytest.mark.usefixtures("alone")
def test_one_process_alone() -> None:
    x = torch.arange(6.0).view(2, 3)
    assert torch.equal(distributed.tensor_model_parallel_all_reduce(x), x)
    assert torch.equal(distributed.tensor_model_parallel_all_gather(x), x)
    assert torch.equal(distributed.tensor_model_parallel_reduce_scatter(x), x)
    assert distributed.broadcast_tensor_dict({"x": x, "y": 1})["y"] == 1
    with pytest.raises(ConfigError, match="was called before"):
        distributed.init_distributed_environment(1, 0)


def test_before_the_start() -> None:
    with pytest.raises(ConfigError, match="call init_distributed_environment first"):
        distributed.get_process_group()
    distributed.destroy_distributed_environment()


def test_a_group_that_does_not_divide_the_processes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tensor_model_parallel_size 2 does not divide the 1 processes"):
        distributed.init_distributed_environment(1, 0, f"file://{tmp_path / 's'}", tensor_model_parallel_size=2)
