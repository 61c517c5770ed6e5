"""`DataParallelRank`, and the example of data parallelism by hand, on one host and on two."""

import contextlib
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from shoal import LLM, SamplingParams, env
from shoal.errors import ConfigError, EngineError
from shoal.launch.open_model import open_model
from shoal.llm.data_parallel import DataParallelRank
from shoal.transport.rendezvous import Rendezvous
from shoal.wire.credentials import Credentials
from support import hosts
from support.certificates import Cluster

EXAMPLE = Path(__file__).parent.parent / "examples" / "offline_data_parallel.py"
KEY = "a key of the test"


@pytest.fixture(params=["plain", "tls"])
def job(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[DataParallelRank]]:
    port = hosts.free_port()
    folder = Cluster(tmp_path).folder() if request.param == "tls" else None
    places = [env.DataParallel(rank, 3, rank, 3, "127.0.0.1", port) for rank in range(3)]
    with ThreadPoolExecutor(3) as pool:
        ranks = list(pool.map(lambda place: DataParallelRank(place, key=KEY, cluster_tls=folder, timeout=60), places))
        yield ranks
        for rank in reversed(ranks):
            rank.close()


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 300])
def test_shares_are_even_and_complete(job: list[DataParallelRank], count: int) -> None:
    prompts = [f"prompt {i}" for i in range(count)]
    shares = [rank.share(prompts) for rank in job]
    assert {index: prompt for share in shares for index, prompt in share.items()} == dict(enumerate(prompts))
    assert sum(map(len, shares)) == count
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_results_come_in_order(job: list[DataParallelRank]) -> None:
    prompts = [str(i) for i in range(10)]

    def run(rank: DataParallelRank) -> list[Any] | None:
        return rank.gather({index: {"text": prompt * 2} for index, prompt in rank.share(prompts).items()})

    with ThreadPoolExecutor(3) as pool:
        for each in (prompts, ["again", "and", "again", "and"], []):
            prompts = each
            assert list(pool.map(run, job)) == [[{"text": prompt * 2} for prompt in prompts], None, None]


def test_a_rank_that_fails_is_named_with_its_prompts(job: list[DataParallelRank]) -> None:
    prompts = list(range(20))
    job[0].share(prompts)
    job[2].close("ran out of memory")
    job[1].close()
    with pytest.raises(EngineError, match=r"rank 2 .* ran out of memory; missing: .*; rank 2 with 6 of 20 prompts"):
        job[0].gather({})


def test_the_environment_sets_the_place_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    assert env.data_parallel() is None
    for name, value in {"RANK": "1", "SIZE": "4", "MASTER_IP": "10.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(f"VLLM_DP_{name}", value)
    assert env.data_parallel() == env.DataParallel(1, 4, 0, 1, "10.0.0.1", 29500, local_assumed=True)
    monkeypatch.setenv("SHOAL_DP_RANK", "3")
    assert env.data_parallel() == env.DataParallel(3, 4, 0, 1, "10.0.0.1", 29500, local_assumed=True)
    monkeypatch.setenv("SHOAL_DP_SIZE_LOCAL", "2")
    assert env.data_parallel() == env.DataParallel(3, 4, 1, 2, "10.0.0.1", 29500)
    monkeypatch.setenv("SHOAL_DP_MASTER_IP", "127.0.0.1")
    monkeypatch.delenv("SHOAL_DP_SIZE_LOCAL")
    assert env.data_parallel() == env.DataParallel(3, 4, 3, 4, "127.0.0.1", 29500), "all ranks are on one host"
    monkeypatch.setenv("SHOAL_DP_MASTER_IP", "[::1]")
    assert env.data_parallel() == env.DataParallel(3, 4, 3, 4, "::1", 29500)
    monkeypatch.setenv("SHOAL_DP_MASTER_IP", "10.0.0.1:29500")
    with pytest.raises(
        ConfigError, match="SHOAL_DP_MASTER_IP must be the name or the address of a host, without a port"
    ):
        env.data_parallel()
    monkeypatch.setenv("SHOAL_DP_MASTER_IP", "127.0.0.1")
    monkeypatch.delenv("SHOAL_DP_MASTER_IP")
    monkeypatch.setenv("SHOAL_DP_RANK", "4")
    with pytest.raises(ConfigError, match="SHOAL_DP_RANK must be an integer from 0 to 3, got '4'"):
        env.data_parallel()
    monkeypatch.delenv("VLLM_DP_MASTER_PORT")
    monkeypatch.setenv("SHOAL_DP_RANK", "0")
    with pytest.raises(ConfigError, match="SHOAL_DP_MASTER_PORT is not set"):
        env.data_parallel()


def test_a_host_name_with_a_loopback_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is accepted if all ranks are on this host."""
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *more, **named: real("127.0.1.1", *more, **named))
    port = hosts.free_port()
    with pytest.raises(ConfigError, match=r"SHOAL_DP_MASTER_IP head is 127\.0\.1\.1 on this host"):
        DataParallelRank(env.DataParallel(0, 2, 0, 1, "head", port), key=KEY)
    for name, value in rank_place(0, port).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SHOAL_DP_MASTER_IP", "head")
    with pytest.raises(ConfigError, match=r"SHOAL_DP_MASTER_IP head is 127\.0\.1\.1 on this host"):
        open_model(None, {})
    DataParallelRank(env.DataParallel(0, 1, 0, 1, "head", port), key=KEY).close()


def test_threads_of_several_processes_cannot_share_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have no way to exchange tensors. It is said before this process waits for the others."""
    for name, value in rank_place(1, hosts.free_port()).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"^--distributed-executor-backend threads: replicas of several processes .*"):
        LLM("bundled:moe", enable_expert_parallel=True, distributed_executor_backend="threads")


def run_example(*arguments: str, netns: str = "", **environment: str) -> "subprocess.Popen[str]":
    inside = ["ip", "netns", "exec", netns] if netns else []
    return subprocess.Popen(
        [*inside, sys.executable, str(EXAMPLE), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def answers(text: str) -> list[str]:
    return [line.split(" -> ", 1)[1] for line in text.splitlines() if " -> " in line]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--node-size", "2", "--node-rank", "2"], "--node-rank 2 is outside of --node-size 2"),
        (["--dp-size", "1", "--node-size", "2"], "--dp-size 1 leaves hosts of --node-size 2 without a replica"),
        (["--node-size", "2"], "needs --master-port"),
        (["--tp-size", "0"], "--tp-size must be at least 1, got 0"),
    ],
)
def test_numbers_that_contradict_each_other_are_refused(arguments: list[str], message: str) -> None:
    process = run_example(*arguments)
    _, log = process.communicate(timeout=120)
    assert process.returncode == 2
    assert message in log


@pytest.mark.slow
def test_a_master_that_does_not_answer_is_named() -> None:
    place = {"RANK": "1", "SIZE": "2", "MASTER_IP": "127.0.0.1", "MASTER_PORT": str(hosts.free_port())}
    process = run_example("--timeout", "1", **{f"SHOAL_DP_{name}": value for name, value in place.items()})
    _, log = process.communicate(timeout=120)
    assert process.returncode == 2
    assert re.search(
        rf"no answer from 127.0.0.1:{place['MASTER_PORT']} within 1 s \(.*\), and no process has joined", log
    )


@pytest.mark.slow
def test_two_replicas_give_the_same_answers_as_one() -> None:
    two = run_example("--dp-size", "2")
    text, log = two.communicate(timeout=300)
    assert two.returncode == 0, log
    with LLM(kv_cache_memory_bytes="16MiB") as llm:
        prompts, params = runpy.run_path(str(EXAMPLE))["PROMPTS"], SamplingParams(temperature=0, max_tokens=16)
        wanted = [output.outputs[0].text for output in llm.generate(prompts, params, use_tqdm=False)]
    assert answers(text) == [repr(each) for each in wanted]
    assert len(answers(text)) == 7
    assert "82" in answers(text)[0]
    assert {line.split(":")[0] for line in text.splitlines() if " -> " in line} == {"rank 0", "rank 1"}


@pytest.mark.slow
@pytest.mark.skipif(bool(hosts.obstacle()), reason=hosts.obstacle())
def test_two_hosts_share_experts_over_ipv6_where_the_second_starts_first() -> None:
    """Run the example with the commands from its docstring, and a mixture of experts."""
    with hosts.two_hosts() as pair:
        common = [*MOE, "--tp-size", "2", "--master-addr", pair[0].address_v6, "--timeout", "240"]
        processes = {}
        for node in (1, 0):
            arguments = [*common, "--node-rank", str(node)]
            processes[node] = run_example(*arguments, netns=pair[node].netns, SHOAL_CLUSTER_KEY=KEY)
        texts = {node: process.communicate(timeout=300) for node, process in processes.items()}
    assert all(process.returncode == 0 for process in processes.values()), texts
    assert answers(texts[1][0]) == []
    assert len(answers(texts[0][0])) == 7
    assert "82" in answers(texts[0][0])[0]


@pytest.mark.slow
@pytest.mark.skipif(bool(hosts.obstacle()), reason=hosts.obstacle())
def test_hosts_need_a_common_key() -> None:
    with hosts.two_hosts() as (host, _):
        common = ["--dp-size", "2", "--node-size", "2", "--master-port", "29533", "--master-addr", host.address]
        process = run_example(*common, netns=host.netns, SHOAL_CLUSTER_KEY="")
        _, log = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "set SHOAL_CLUSTER_KEY, or" in log
    assert "to the same secret on all hosts" in log


def rank_place(rank: int, port: int) -> dict[str, str]:
    """Return the environment of the example's mode in which one process is one rank."""
    place = {"RANK": rank, "SIZE": 2, "MASTER_IP": "127.0.0.1", "MASTER_PORT": port}
    return {f"SHOAL_DP_{name}": str(value) for name, value in place.items()}


@pytest.mark.slow
def test_a_number_that_is_used_twice_is_refused() -> None:
    """The second process is refused, and the first one goes on waiting for the missing rank."""
    port = hosts.free_port()
    with Rendezvous(port=port, credentials=Credentials(KEY)):
        processes = [run_example(SHOAL_CLUSTER_KEY=KEY, **rank_place(1, port)) for _ in range(2)]
        until(lambda: any(process.poll() is not None for process in processes), "one is refused")
        (refused,) = (process for process in processes if process.poll() is not None)
        for process in processes:
            process.kill()
        logs = {process: process.communicate(timeout=60)[1] for process in processes}
    assert refused.returncode == 2
    assert "has already joined: give every process a rank of its own" in logs[refused]


def descendants(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    found = [int(child) for child in children]
    return found + [each for child in found for each in descendants(child)]


def until(reached: Callable[[], object], what: str, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, what
        threading.Event().wait(0.02)


@pytest.mark.slow
def test_ranks_end_with_the_process_that_started_them() -> None:
    port = hosts.free_port()
    process = run_example("--dp-size", "2", "--node-size", "2", "--master-port", str(port), SHOAL_CLUSTER_KEY=KEY)
    until(lambda: listens(port), "the rank waits for the other host")
    ranks = descendants(process.pid)
    assert ranks
    process.kill()
    process.communicate(timeout=60)
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks), "a rank does not end")


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


MOE = ["--model", "bundled:moe", "--dp-size", "2", "--node-size", "2", "--enable-expert-parallel"]
MOE += ["--max-model-len", "256", "--kv-cache-memory-bytes", "16MiB", "--master-port", "29533"]


@contextlib.contextmanager
def two_moe_hosts(*more: str) -> Iterator[list["subprocess.Popen[str]"]]:
    with hosts.two_hosts() as pair:
        common = [*MOE, *more, "--master-addr", pair[0].address, "--timeout", "240"]
        processes = [
            run_example(*common, "--node-rank", str(node), netns=host.netns, SHOAL_CLUSTER_KEY=KEY)
            for node, host in enumerate(pair)
        ]
        try:
            yield processes
        finally:
            for process in processes:
                process.kill()
                process.communicate(timeout=60)


@pytest.mark.slow
@pytest.mark.skipif(bool(hosts.obstacle()), reason=hosts.obstacle())
def test_a_host_that_dies_ends_the_host_that_shares_its_experts(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{i} + {i} =\n" for i in range(20_000)))
    with two_moe_hosts("--prompts", str(prompts)) as processes:
        for process in processes:
            assert process.stderr is not None
            assert any("engine ready" in line for line in process.stderr)
        rank = descendants(processes[1].pid)[0]
        os.kill(rank, signal.SIGKILL)
        _, log = processes[0].communicate(timeout=120)
    assert processes[0].returncode == 1, log
    assert re.search(
        r"replica 1 \(.*process \d+\) ended(, or lost its connection| while this replica has work)", log
    ), log
