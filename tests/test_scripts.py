"""The scripts of the repository, in a copy with fakes of Python and `shoal` in `.venv`."""

import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # starts processes

ROOT = Path(__file__).parent.parent
HINT = "run .venv/bin/shoal, or 'source .venv/bin/activate' and then shoal"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in ("pyproject.toml", "constraints.txt", "setup.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("scripts", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / name)
    stand_in(tmp_path, "python", "echo Successfully installed nothing")
    stand_in(tmp_path, "shoal", 'echo "shoal $*"')
    return tmp_path


def stand_in(folder: Path, name: str, does: str) -> None:
    file = folder / ".venv" / "bin" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{does}\n")
    file.chmod(0o755)


def run(folder: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(folder / "scripts" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_setup_prints_where_the_program_is(copy: Path) -> None:
    done = run(copy, "setup")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"setup: done; {HINT}"
    assert run(copy, "setup").stdout == "", "nothing has changed, so nothing is printed"


def test_the_demo_prints_where_the_program_is(copy: Path) -> None:
    run(copy, "setup")
    done = run(copy, "demo", "-p", "Hi")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "shoal generate --device cpu --tensor-parallel-size 2 -p Hi\n"
    assert done.stderr == f"demo: done; {HINT}\n"


def test_a_failed_demo_is_reported(copy: Path) -> None:
    run(copy, "setup")
    stand_in(copy, "shoal", "exit 2")
    done = run(copy, "demo")
    assert (done.returncode, done.stderr) == (2, "")


def test_the_readme_names_the_same_program() -> None:
    readme = " ".join((ROOT / "README.md").read_text("utf-8").split())
    assert ".venv/bin/shoal" in readme
    assert "source .venv/bin/activate" in readme
