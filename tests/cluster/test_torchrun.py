"""Programs of which torchrun, or the user, starts a process on each host: all get the outputs of rank 0."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from shoal.errors import ConfigError
from shoal.launch.open_model import open_model
from support import hosts, processes
from support.certificates import Cluster
from support.checkpoints import Reference
from support.programs import Start, found_by, started_programs

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "torchrun_offline.py"
PROMPT = [5, 17, 200, 33, 4, 90, 121]
NUM_TOKENS = 8
_WAIT_S = 240.0

needs_hosts = pytest.mark.skipif(bool(hosts.obstacle()), reason=hosts.obstacle())

BEGIN = """
import dataclasses, json, os, signal, sys, time
from shoal import LLM, SamplingParams, ShoalError
from shoal.params import BeamSearchParams
from shoal.log import configure_logging
configure_logging()
folder, options = sys.argv[1], json.loads(sys.argv[2])
greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False, logprobs=2, prompt_logprobs=1)
prompt = {"prompt_token_ids": [5, 17, 200, 33, 4, 90, 121]}
found = {}

def call(name, run):
    try:
        found[name] = run()
    except ShoalError as error:
        found[name] = f"{type(error).__name__}: {error}"

def tell():
    def plain(value):
        return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else list(value)
    print("FOUND" + json.dumps(found, default=plain), flush=True)
"""

ALL_CALLS = (
    BEGIN
    + """
import socket
import torch.distributed
# torch's own group uses the address of the host's name, which is the same for both hosts here.
os.environ["GLOO_SOCKET_IFNAME"] = next(name for _, name in socket.if_nameindex() if name != "lo")
try:
    llm = LLM(folder, dtype="float32", kv_cache_memory_bytes="16MiB", max_model_len=128, **options)
except ShoalError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
rank = torch.distributed.get_rank()
call("rank", lambda: rank)
call("generate", lambda: llm.generate([prompt, prompt], greedy, use_tqdm=False))
call("refused", lambda: llm.generate([{"prompt_token_ids": [1] * 500}], greedy, use_tqdm=False))
call("sleep", llm.sleep)
call("asleep", lambda: [llm.is_sleeping(), llm.wake_up(), llm.is_sleeping()])
if rank:
    call("mixed up", lambda: llm.beam_search([prompt], BeamSearchParams(beam_width=2, max_tokens=2)))
    call("changed", lambda: llm.generate([prompt], SamplingParams(temperature=0, max_tokens=2), use_tqdm=False))
    call("stepped", lambda: llm.engine.updates(0))
else:
    for _ in range(2):
        llm.generate([prompt], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
call("emptied", llm.reset_prefix_cache)
tell()
torch.distributed.barrier()
if rank:
    os.kill(os.getpid(), signal.SIGKILL)
while True:
    time.sleep(1)
"""
)

ONE_CALL = (
    BEGIN
    + """
options = {"dtype": "float32", **options}
try:
    with LLM(folder, kv_cache_memory_bytes="16MiB", max_model_len=128, **options) as llm:
        call("generate", lambda: llm.generate([prompt], greedy, use_tqdm=False))
except ShoalError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
tell()
"""
)


@pytest.fixture
def start() -> Iterator[Start]:
    with started_programs() as run:
        yield run


def torchrun(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *arguments]


def write(folder: Path, text: str, **options: Any) -> list[str]:
    """Write a program, and return how it is called."""
    program = folder / "program.py"
    program.write_text(text)
    return [str(program), str(folder), json.dumps(options)]


def tokens(outputs: list[dict[str, Any]]) -> list[list[int]]:
    return [each["outputs"][0]["token_ids"] for each in outputs]


@pytest.mark.slow
def test_the_example(start: Start) -> None:
    sizes = ["--pipeline-parallel-size", "2", "--kv-cache-memory-bytes", "16MiB", "--max-model-len", "64"]
    job = start(torchrun("--standalone", "--nproc-per-node", "2", str(EXAMPLE), *sizes))
    assert job.await_end() == 0, job.text
    assert job.text.count("'37 + 45 =' -> ' 82'") == 1


@pytest.mark.slow
@needs_hosts
def test_processes_on_two_hosts_get_the_results_of_rank_0_and_end_together(
    start: Start, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """The hosts have unequal numbers of ranks. Their connections use TLS, with a certificate for each host."""
    folder, cluster = checkpoint("llama"), Cluster(tmp_path)
    program = write(folder, ALL_CALLS, tensor_parallel_size=3, distributed_executor_backend="external_launcher")
    ranks: set[int] = set()
    deadline = time.monotonic() + _WAIT_S
    with hosts.two_hosts() as pair:
        where = ["--nnodes", "2", "--master-addr", pair[0].address, "--master-port", "29431"]
        jobs = [
            start(
                [
                    *host.inside,
                    *torchrun(*where, "--node-rank", str(node), "--nproc-per-node", str(2 - node), *program),
                ],
                NCCL_DEBUG="WARN",
                SHOAL_CLUSTER_TLS=str(cluster.folder(f"host {node}")),
            )
            for node, host in enumerate(pair)
        ]
        while not all(job.has_ended(0.1) for job in jobs) and time.monotonic() < deadline:
            for job in jobs:
                ranks |= set(processes.descendants(job.process.pid))
        assert [job.await_end() for job in jobs] == [1, 1]  # as a process of each was killed
    assert all("connections between hosts use TLS" in job.text for job in jobs)
    name = os.uname().nodename
    assert f"ranks 0-1 on {name} ({pair[0].address}), 2 on {name} ({pair[1].address}): " in jobs[0].text
    variables = f"ranks of node 1 ({name}, {pair[1].address}) get these variables unless they are set there: NCCL_DEBUG"
    assert variables in jobs[0].text

    first, *others = sorted((each for job in jobs for each in found_by(job)), key=lambda each: each["rank"])
    assert [each["rank"] for each in others] == [1, 2]
    expected = Reference(folder).greedy(PROMPT, NUM_TOKENS)[0]
    assert tokens(first["generate"]) == [expected, expected]
    assert len(first["generate"][0]["prompt_logprobs"]) == len(PROMPT)
    assert first["refused"].startswith("RequestError: prompt 0: ")
    assert [first["sleep"], first["asleep"], first["emptied"]] == [None, [True, None, False], True]
    for other in others:
        for name in ("generate", "refused", "sleep", "asleep", "emptied"):
            assert other[name] == first[name], name  # with all log-probabilities
        assert other["mixed up"] == (
            f"ConfigError: call 5 of rank {other['rank']} is beam_search with 1 prompt, but that of rank 0 is generate "
            "with 1 prompt: all processes must make the same calls in the same order"
        )
        assert "but that of rank 0 is generate with 1 prompt with other arguments: " in other["changed"]
        assert f"only rank 0 has the engine, and this is rank {other['rank']}" in other["stepped"]
    assert len(ranks) >= 6  # three processes, and three ranks
    while left := [pid for pid in ranks if processes.is_running(pid)]:  # the kernel ends ranks with their parent
        assert time.monotonic() < deadline, left
        os.sched_yield()


@pytest.mark.slow
@needs_hosts
def test_the_same_program_on_each_host_without_torchrun(start: Start, checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("llama")
    with hosts.two_hosts() as pair:
        runs = []
        for rank, host in enumerate(pair):
            options = {"nnodes": 2, "node_rank": rank, "master_addr": pair[0].address, "pipeline_parallel_size": 2}
            command = [*host.inside, sys.executable, *write(folder, ONE_CALL, **options)]
            runs.append(start(command, SHOAL_CLUSTER_KEY="a key of the test"))
        assert [run.await_end() for run in runs] == [0, 0]
    expected = Reference(folder).greedy(PROMPT, NUM_TOKENS)[0]
    assert [tokens(found_by(run)[0]["generate"]) for run in runs] == [[expected], [expected]]


@pytest.mark.slow
@needs_hosts
def test_all_processes_are_told_of_one_that_differs(start: Start, checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("llama")
    with hosts.two_hosts() as pair:
        runs = []
        for rank, host in enumerate(pair):
            options = {"nnodes": 2, "node_rank": rank, "master_addr": pair[0].address, "tensor_parallel_size": 2}
            options |= {"block_size": 8} if rank else {}
            command = [*host.inside, sys.executable, *write(folder, ONE_CALL, **options)]
            runs.append(start(command, SHOAL_CLUSTER_KEY="a key of the test"))
        assert [run.await_end() for run in runs] == [2, 2]
    for run in runs:
        (error,) = [line for line in run.text.splitlines() if line.startswith("error: ")]
        assert "its --block-size is 8, that of node 0" in error


@contextmanager
def _variables(monkeypatch: pytest.MonkeyPatch, **values: int) -> Iterator[None]:
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    yield


PLACE = {"RANK": 0, "WORLD_SIZE": 3, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 3, "GROUP_RANK": 0, "GROUP_WORLD_SIZE": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"tensor_parallel_size": 2},
            "torchrun has started 3 processes, one for each rank of one replica, but --tensor-parallel-size 2 x "
            "--pipeline-parallel-size 1 x --data-parallel-size 1 is 2 ranks of 1: start 2 processes in all",
        ),
        (
            {"tensor_parallel_size": 3, "data_parallel_size": 2},
            "x --data-parallel-size 2 is 6 ranks of 2: use --data-parallel-size 1",
        ),
        (
            {"tensor_parallel_size": 3, "nnodes": 2, "master_addr": "10.0.0.1"},
            "torchrun says which ranks run where, so leave --nnodes, --master-addr out",
        ),
    ],
    ids=["sizes", "replicas", "nodes"],
)
def test_options_that_do_not_fit_the_processes_of_torchrun(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    with _variables(monkeypatch, **PLACE), pytest.raises(ConfigError, match=message):
        open_model(None, {"distributed_executor_backend": "external_launcher", **options})


def test_without_torchrun() -> None:
    with pytest.raises(ConfigError, match=r"RANK and WORLD_SIZE are not set: start this one with torchrun"):
        open_model(None, {"distributed_executor_backend": "external_launcher"})


def test_a_variable_of_torchrun_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with _variables(monkeypatch, **{**PLACE, "GROUP_RANK": -1}), pytest.raises(ConfigError, match="GROUP_RANK must be"):
        open_model(None, {"distributed_executor_backend": "external_launcher"})


@pytest.mark.parametrize("kind", [{"online": True}, {"own_process": True}], ids=["server", "command"])
def test_commands_and_servers_refuse_external_launcher(kind: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"is for programs with LLM.* that torchrun starts, not for commands"):
        open_model(None, {"distributed_executor_backend": "external_launcher"}, **kind)
