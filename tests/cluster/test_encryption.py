"""Connections between two hosts (network namespaces) with TLS and without: what crosses the cable, and who gets in."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.wire.tokens import encode_tokens
from support import hosts
from support.certificates import Cluster
from support.checkpoints import Reference
from support.host_programs import KEY, NUM_TOKENS, PORT, PROMPT, SMALL, Program, ask, generation

pytestmark = [
    pytest.mark.slow,  # starts processes
    pytest.mark.skipif(bool(hosts.obstacle()), reason=hosts.obstacle()),
]

Start = Callable[..., Program]
Two = tuple[hosts.Host, hosts.Host]

OUTSIDER = {"SHOAL_CLUSTER_KEY": "not the key"}  # who knows the key, and cannot join, ends the leader

TOKENS = encode_tokens(PROMPT)
MESSAGES = (b"Challenge", b"EngineCall", b"StepPlan", b"RankSetup", b"EngineRequest", b"RoomMessage", b"StoreSet")


def nodes(two: Two, rank: int) -> list[str]:
    return ["--nnodes", "2", "--node-rank", str(rank), "--master-addr", two[0].address]


def error_of(program: Program) -> str:
    """Wait until a program has ended with an error of the user, and return its one line."""
    assert program.await_end() == 2, program.text
    (line,) = (line for line in program.text.splitlines() if line.startswith("error: "))
    return line


def tokens_in(output: Path) -> list[int]:
    (line,) = output.read_text().splitlines()
    found: list[int] = json.loads(line)["outputs"][0]["token_ids"]
    return found


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """Return the flags of each of the two hosts."""
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    return [["--cluster-tls", str(cluster.folder(name))] for name in ("first", "second")]


def test_without_tls_prompts_can_be_read_but_not_the_key(
    start: Start, two: Two, checkpoint: Callable[[str], Path], tls: list[list[str]], tmp_path: Path
) -> None:
    folder, output = checkpoint("llama"), tmp_path / "answers.jsonl"
    common = [*generation(folder), "--output", str(output), "-tp", "2", "--dtype", "float32"]
    with hosts.recorded(two[0]) as seen:
        leader = start(two[0], *common, *nodes(two, 0))
        with_tls = start(two[1], *common, *nodes(two, 1), *tls[1], environment=OUTSIDER)
        assert f"{two[0].address}:29501 does not use TLS: give --cluster-tls to all hosts" in error_of(with_tls)
        leader.await_text(f"a process at {two[1].address} cannot join at {two[0].address}:29501: it uses TLS")
        node = start(two[1], *common, *nodes(two, 1))
        assert (leader.await_end(), node.await_end()) == (0, 0), leader.text
    assert tokens_in(output) == Reference(folder).greedy(PROMPT, NUM_TOKENS)[0]
    assert TOKENS in seen
    assert b"StepPlan" in seen
    assert KEY.encode() not in seen
    for program in (leader, node):
        assert program.text.count("authenticated but not encrypted") == 1


def test_with_tls_nothing_can_be_read_and_strangers_are_refused(
    start: Start, two: Two, checkpoint: Callable[[str], Path], tls: list[list[str]], tmp_path: Path
) -> None:
    folder, output = checkpoint("llama"), tmp_path / "answers.jsonl"
    foreign = ["--cluster-tls", str(Cluster(tmp_path).folder("foreign"))]
    common = [*generation(folder), "--output", str(output), "-tp", "2", "--dtype", "float32"]
    leader = start(two[0], *common, *nodes(two, 0), *tls[0])
    plain, stranger = (start(two[1], *common, *nodes(two, 1), *flags, environment=OUTSIDER) for flags in ([], foreign))
    assert f"{two[0].address}:29501: it uses TLS: give --cluster-tls here too" in error_of(plain)
    assert f"{two[0].address}:29501 can't be joined: its certificate has another CA" in error_of(stranger)
    for why in ("it does not use TLS", "it does not accept the certificate of this host", "the shared key differs"):
        leader.await_text(f"a process at {two[1].address} cannot join at {two[0].address}:29501: {why}")
    with hosts.recorded(two[0]) as seen:
        node = start(two[1], *common, *nodes(two, 1), *tls[1])
        assert (leader.await_end(), node.await_end()) == (0, 0), leader.text
    assert tokens_in(output) == Reference(folder).greedy(PROMPT, NUM_TOKENS)[0]
    assert "connections between hosts use TLS" in leader.text
    assert len(seen) > 10_000
    assert [secret for secret in (TOKENS, KEY.encode(), *MESSAGES) if secret in seen] == []


def test_replicas_in_lockstep_and_the_doctor_use_tls(start: Start, two: Two, tls: list[list[str]]) -> None:
    """A front end, a headless host, a room, the store of the ranks' groups; then the doctor on both hosts."""
    common = ["serve", "bundled:moe", *SMALL, "-dp", "2", "-ep", "--data-parallel-size-local", "1"]
    common += ["--data-parallel-address", two[0].address]
    with hosts.recorded(two[0]) as seen:
        headless = start(two[1], *common, "--headless", "--data-parallel-start-rank", "1", *tls[1])
        server = start(two[0], *common, "--port", str(PORT), *tls[0])
        server.await_text("Shoal serves")
        headless.await_text("replica 1 (process")
        assert all(ask(two[0], f"{seed} apples", seed, model="bundled:moe") for seed in range(2))
        for program in (server, headless):
            program.process.send_signal(signal.SIGTERM)
            assert program.await_end() == 0, program.text
        examined = [start(two[rank], "doctor", "--ranks", "0", *nodes(two, rank), *tls[rank]) for rank in range(2)]
        for program in examined:
            assert program.await_end() in (0, 1), program.text
            assert "all hosts have the same versions" in program.text
            assert "gloo" in program.text
    assert len(seen) > 10_000
    assert [secret for secret in (KEY.encode(), b"apples", *MESSAGES) if secret in seen] == []
