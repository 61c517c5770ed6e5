"""One replica over two hosts (network namespaces), started natively: `--nnodes 2` on each host."""

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from support import hosts, processes
from support.certificates import Cluster
from support.checkpoints import Reference
from support.host_programs import NUM_TOKENS, PORT, PROMPT, SMALL, WAIT_S, Program, ask, generation

pytestmark = [
    pytest.mark.slow,  # starts processes
    pytest.mark.skipif(bool(hosts.obstacle()), reason=hosts.obstacle()),
]


Start = Callable[..., Program]


def nodes(two: tuple[hosts.Host, hosts.Host], rank: int) -> list[str]:
    return ["--nnodes", "2", "--node-rank", str(rank), "--master-addr", two[0].address]


def generate(
    start: Start, two: tuple[hosts.Host, hosts.Host], folder: Path, *flags: str
) -> tuple[list[int], Program, Program]:
    """Run `shoal generate` on both hosts, host 1 first. Return the tokens, and the programs."""
    output = folder / "answers.jsonl"
    output.unlink(missing_ok=True)
    common = [*generation(folder), "--output", str(output), *flags]
    other = start(two[1], *common, *nodes(two, 1))
    leader = start(two[0], *common, *nodes(two, 0))
    assert leader.await_end() == 0, leader.text
    assert other.await_end() == 0, other.text
    (line,) = output.read_text().splitlines()
    return json.loads(line)["outputs"][0]["token_ids"], leader, other


@pytest.mark.parametrize(
    ("model", "flags", "placed"),
    [
        ("llama", ["-tp", "2", "-pp", "2", "--measure-links"], "0-1 on {0}, 2-3 on {1}"),
        ("mixtral", ["-tp", "3", "-ep", "--placement", "0=0|1=1,2"], "0 on {0}, 1-2 on {1}"),
    ],
    ids=["tp inside, pp across", "tp and experts across"],
)
def test_a_replica_over_two_hosts_gives_the_tokens_of_transformers(
    start: Start,
    two: tuple[hosts.Host, hosts.Host],
    checkpoint: Callable[[str], Path],
    model: str,
    flags: list[str],
    placed: str,
) -> None:
    folder = checkpoint(model)
    before = hosts.sent_bytes(two[0])
    tokens, leader, _ = generate(start, two, folder, *flags, "--dtype", "float32")
    assert tokens == Reference(folder).greedy(PROMPT, NUM_TOKENS)[0]
    where = (f"{os.uname().nodename} ({host.address})" for host in two)
    assert f"ranks {placed.format(*where)}: " in leader.text
    assert ("--measure-links: 1 link between the hosts of a replica, with " in leader.text) == (
        "--measure-links" in flags
    )
    hidden = 64
    floats = (len(PROMPT) + NUM_TOKENS - 1) * hidden  # the residual stream crosses hosts at least once
    assert hosts.sent_bytes(two[0]) - before > 4 * floats


@contextmanager
def served(start: Start, two: tuple[hosts.Host, hosts.Host], *flags: str) -> Iterator[tuple[Program, Program]]:
    """Yield the server on host 0, and the node on host 1."""
    other = start(two[1], "serve", "bundled", *SMALL, *flags, *nodes(two, 1), "--headless")
    server = start(two[0], "serve", "bundled", "--port", str(PORT), *SMALL, *flags, *nodes(two, 0))
    server.await_text("Shoal serves")
    yield server, other


def test_no_request_is_lost_when_hosts_end_or_are_cut_off_under_load(
    start: Start, two: tuple[hosts.Host, hosts.Host]
) -> None:
    """A spare host takes the place of one that is killed. Then it is cut off, and the replica waits for it."""
    with served(start, two, "-pp", "2", "--spare-hosts", "1") as (server, other), ThreadPoolExecutor(6) as pool:
        spare = start(two[1], "serve", "bundled", *SMALL, "-pp", "2", "--spare-hosts", "1", *nodes(two, 2))
        spare.await_text("node 2 of 2 is with its leader")
        expected = list(pool.map(lambda seed: "".join(ask(two[0], f"{seed} apples", seed)), range(6)))

        streams = [pool.submit(ask, two[0], f"{seed} apples", seed) for seed in range(6)]
        for pid in processes.children(other.process.pid):
            os.kill(pid, signal.SIGKILL)
        other.process.kill()
        server.await_text("is lost: node 1", "was killed by SIGKILL")
        server.await_text("takes the place of node 1")
        assert ["".join(stream.result(WAIT_S)) for stream in streams] == expected

        hosts.cut(two[1])
        try:
            server.await_text("its 0 unfinished requests wait")  # within 8 s; the deadline of the wait is far above
        finally:
            hosts.join(two[1])
        assert "".join(ask(two[0], "2 apples", 2)) == expected[2]

        server.process.send_signal(signal.SIGTERM)
        assert server.await_end() == 0, server.text
        spare.await_text("waiting for the next one")
        spare.process.send_signal(signal.SIGTERM)
        assert spare.await_end() == 0, spare.text


def ready_spare(program: Program) -> int:
    """Wait until the warm spare of a host has loaded everything, and return its process."""
    program.await_text("is ready and takes")
    (spare,) = re.findall(r"a warm spare, process (\d+), is ready and takes", program.text)
    return int(spare)


@pytest.mark.timeout(300)  # spares load with a low priority
def test_a_rank_that_is_killed_is_replaced_alone(start: Start, two: tuple[hosts.Host, hosts.Host]) -> None:
    """First a rank on the node, then the one beside the engine: each by the warm spare of its host.

    Streams go on, and the other rank keeps its process.
    """
    with served(start, two, "-tp", "2", "--warm-spares", "1") as (server, other), ThreadPoolExecutor(4) as pool:
        expected = list(pool.map(lambda seed: "".join(ask(two[0], f"{seed} apples", seed)), range(4)))
        spares = [ready_spare(server), ready_spare(other)]
        (theirs,) = set(processes.children(other.process.pid)) - set(spares)
        (engine,) = processes.children(server.process.pid)
        (ours,) = set(processes.children(engine)) - set(spares)
        for bad, killed in ((1, theirs), (0, ours)):
            streams = [pool.submit(ask, two[0], f"{seed} apples", seed) for seed in range(4)]
            os.kill(killed, signal.SIGKILL)
            assert ["".join(stream.result(WAIT_S)) for stream in streams] == expected
            host = f" on node 1 ({os.uname().nodename}, {two[1].address})" if bad else ""
            named = rf"rank {bad} \(process {killed}{re.escape(host)}, .*\)"
            assert re.search(rf"{named} was killed by SIGKILL; it is replaced, the other", server.text)
            assert f"rank {bad}: replaced in " in server.text
            program = other if bad else server
            assert f"rank {bad}: the warm spare, process {spares[bad]}, forks its new process" in program.text
            if bad == 1:
                (theirs_now,) = set(processes.children(other.process.pid)) - set(spares)
                assert Path(f"/proc/{ours}").exists()
            else:
                assert Path(f"/proc/{theirs_now}").exists()
        assert "started again" not in server.text
        assert "the engine has gone" not in other.text


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (["--max-num-seqs", "0"], "--max-num-seqs must be at least 1, got 0"),
        (["--cluster-tls", "FOREIGN"], "can't be joined: its certificate has another CA"),
    ],
    ids=["fails before it has joined", "certificate of another cluster"],
)
def test_a_node_that_cannot_join_is_told_why_and_so_are_all_others(
    start: Start,
    two: tuple[hosts.Host, hosts.Host],
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    changed: list[str],
    told: str,
) -> None:
    """Node 2 fails, or cannot make a connection; node 1 waits with the leader. All end with the same line."""
    ours = ["--cluster-tls", str(Cluster(tmp_path / "ours").folder())]
    foreign = str(Cluster(tmp_path / "foreign").folder())
    common = [*generation(checkpoint("llama")), "--output", "-", "-tp", "3", "--nnodes", "3"]
    where = ["--master-addr", two[0].address]
    first, second = (start(two[rank], *common, *ours, *where, "--node-rank", str(rank)) for rank in range(2))
    first.await_text("node 1 (")
    last = [each.replace("FOREIGN", foreign) for each in [*ours, *changed]]
    third = start(two[1], *common, *last, *where, "--node-rank", "2")
    programs = (first, second, third)
    assert [program.await_end() for program in programs] == [2, 2, 2]
    for program in programs:
        error = [line for line in program.text.splitlines() if line.startswith("error: ")]
        assert len(error) == 1, program.text
        assert told in error[0], program.text
