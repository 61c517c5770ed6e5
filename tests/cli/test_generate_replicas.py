"""`shoal generate -dp 2` that loses a replica, is interrupted or is killed.

conformance/test_data_parallel.py has replicas that all die, test_jobs.py the message of a job whose engine fails.
"""

import json
import os
import re
import select
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from cli.test_jobs import children_of, interrupt, started, wait_for_lines

pytestmark = pytest.mark.slow  # starts processes

Shoal = Callable[..., int]

COUNT = 200
SMALL = ["--kv-cache-memory-bytes", "2MiB", "--max-model-len", "64", "--max-num-seqs", "4", "--ignore-eos"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i} + {i} ="}) + "\n" for i in range(COUNT)))
    return path


def command(prompts: Path, output: Path, *more: str) -> list[str]:
    return ["generate", "--prompts-file", str(prompts), "--output", str(output), "--max-tokens", "8", *SMALL, *more]


def texts(output: Path) -> dict[int, str]:
    lines = [json.loads(line) for line in output.read_bytes().splitlines()]
    assert len({line["index"] for line in lines}) == len(lines)
    return {line["index"]: line["outputs"][0]["text"] for line in lines}


def offspring(pid: int) -> list[int]:
    """Return the engine processes of a command, and their ranks."""
    found = children_of(pid)
    return found + [each for child in found for each in offspring(child)]


@contextmanager
def watching(pid: int) -> Iterator[int]:
    """Return a file descriptor that is readable once the process has ended."""
    file = os.pidfd_open(pid)
    try:
        yield file
    finally:
        os.close(file)


def wait_for_end(file: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(file, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


def test_a_replica_is_killed_half_way(shoal: Shoal, tmp_path: Path, prompts: Path) -> None:
    output, alone = tmp_path / "out.jsonl", tmp_path / "alone.jsonl"
    with started(command(prompts, output, "-dp", "2")) as process:
        wait_for_lines(process, output, COUNT // 2)
        victim = max(children_of(process.pid))
        os.kill(victim, signal.SIGKILL)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    (told,) = re.findall(r"(replica \d \(process \d+\) was killed by SIGKILL); its \d+ unfinished requests go on", err)
    assert f"process {victim}" in told
    assert shoal(*command(prompts, alone, "--max-num-seqs", "64")) == 0
    assert texts(output) == texts(alone)
    assert len(texts(output)) == COUNT


def test_interrupted(tmp_path: Path, prompts: Path) -> None:
    output = tmp_path / "out.jsonl"
    with started(command(prompts, output, "-dp", "2"), log_level="info", start_new_session=True) as process:
        wait_for_lines(process, output, 10)
        told, log = interrupt(process, signal.SIGINT)
    assert "go on with: shoal generate" in told
    ready = re.findall(r"replica (\d) \(process \d+\) is ready after", log)
    assert sorted(ready) == ["0", "1"], "the log has a line for each replica"


def test_a_killed_command_leaves_no_process(tmp_path: Path, prompts: Path) -> None:
    output = tmp_path / "out.jsonl"
    with started(command(prompts, output, "-dp", "2", "-tp", "2")) as process, ExitStack() as stack:
        wait_for_lines(process, output, 1)
        processes = offspring(process.pid)
        assert len(processes) == 2 * 3
        watched = [stack.enter_context(watching(pid)) for pid in processes]
        process.kill()
        process.wait(10)
        for child in watched:
            assert wait_for_end(child, 60), "a process is still there"
