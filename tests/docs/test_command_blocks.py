"""Run the command blocks of the README and the docs with the bundled model.

A comment above a block says how: `<!-- run -->`, `<!-- run: serve -->` (it starts a server, which is ended when it has
printed its URL), `<!-- run: client -->` (it uses a server), or `<!-- skip: reason -->`. A command that several pages
have runs once. Commands that load PyTorch, and programs, run in forks of a process that has loaded it, with ranks as
threads; a server of a block has its ranks in processes.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.forked_commands import ForkedCommands
from support.servers import ShoalServer

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PRINTED_ADDRESS = "http://127.0.0.1:8000"
DEADLINE_S = 200

# A block has several commands, each of which starts a model.
pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]
_BLOCK = re.compile(r"(?:^<!-- (?P<note>[^>]*) -->\n)?^```(?P<language>sh|python)\n(?P<text>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    note: str
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def blocks() -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text("utf-8")
        for found in _BLOCK.finditer(text):
            line = text.count("\n", 0, found.start("text"))
            yield Block(str(page.relative_to(ROOT)), line, found["note"] or "", found["language"], found["text"])


def noted(note: str) -> list[Block]:
    return [block for block in blocks() if block.note == note]


def by_name(found: list[Block]) -> dict[str, object]:
    return {"argvalues": found, "ids": [block.name for block in found]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with `shoal` on PATH and the files that blocks use."""
    (tmp_path / "schema.json").write_text('{"type": "object", "properties": {"name": {"type": "string"}}}')
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "37 + 45 ="}\n{"prompt": "Reverse: apple ->"}\n')
    return tmp_path


ENVIRONMENT = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": ""}
LOADS_PYTORCH = ("shoal generate ", "shoal doctor")


@pytest.fixture(scope="module")
def forks() -> Iterator[ForkedCommands]:
    with ForkedCommands({**ENVIRONMENT, "SHOAL_DISTRIBUTED_EXECUTOR_BACKEND": "threads"}) as found:
        yield found


def run(block: Block, folder: Path, text: str) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text] if block.language == "sh" else [sys.executable, "-c", text],
        cwd=folder,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, f"{block.name}: {done.stderr[-2000:]}"
    return done.stdout


def run_in_fork(block: Block, folder: Path, text: str, forks: ForkedCommands) -> str:
    if block.language == "python":
        done = forks.program(folder, text)
    else:
        done = forks.command(folder, shlex.split(text)[1:])
    assert done.code == 0, f"{block.name}: {text}: {done.stderr[-2000:]}"
    return done.stdout


_ran: set[str] = set()  # the commands of shoal that have succeeded


def not_yet_run(block: Block) -> list[str]:
    """Return the parts of a block without the commands of shoal that have run before."""
    text = with_model(block.text)
    if block.language != "sh" or not all(line.startswith("shoal ") for line in text.splitlines()):
        return [text]
    lines = [line.partition(" #")[0].strip() for line in text.splitlines()]
    return [line for line in lines if line not in _ran]


def with_model(text: str) -> str:
    return re.sub(r"\bMIXTURE\b", "bundled:moe", re.sub(r"\bMODEL\b", "bundled", text))


def test_every_block_says_whether_it_runs() -> None:
    silent = [block.name for block in blocks() if not re.fullmatch(r"run(: serve|: client)?|skip: .+", block.note)]
    assert silent == []


@pytest.mark.parametrize("block", **by_name(noted("run")))  # type: ignore[arg-type]
def test_a_block_runs_as_printed(block: Block, folder: Path, forks: ForkedCommands) -> None:
    for text in not_yet_run(block):
        written = set(folder.iterdir())
        if block.language == "python" or text.startswith(LOADS_PYTORCH):
            told = run_in_fork(block, folder, text, forks)
        else:
            told = run(block, folder, text)
        assert told or set(folder.iterdir()) - written - {folder / "stdout", folder / "stderr"}, "it tells something"
        _ran.add(text)


@pytest.fixture(scope="module")
def server() -> Iterator[ShoalServer]:
    with ShoalServer() as found:
        yield found


@pytest.mark.parametrize("block", **by_name(noted("run: client")))  # type: ignore[arg-type]
def test_a_block_that_talks_to_a_server_runs_as_printed(block: Block, folder: Path, server: ShoalServer) -> None:
    text = with_model(block.text).replace(PRINTED_ADDRESS, server.url)
    assert run(block, folder, text) != ""


@pytest.mark.parametrize("block", **by_name(noted("run: serve")))  # type: ignore[arg-type]
def test_a_block_that_starts_a_server_runs_as_printed(block: Block) -> None:
    for line in block.text.replace("\\\n", " ").splitlines():
        arguments = with_model(line.partition("#")[0]).replace("--port 8000", "").split()
        assert arguments[:2] == ["shoal", "serve"], line
        with ShoalServer(*arguments[2:]) as found:
            found.process.send_signal(signal.SIGTERM)
            assert found.process.wait(DEADLINE_S) == 0
