"""Tests that started processes do not run files with names of modules in the working directory or beside a script."""

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import shoal
from support.servers import ShoalServer

pytestmark = pytest.mark.slow  # starts processes

HOME = Path(shoal.__file__).parent.parent
NAMES = ("queue", "torch", "types", "json", "numpy", "click", "runpy", "shoal", "sitecustomize")
# Starts a Python process like a ChildProcess, and prints its output.
START = """
import subprocess, sys
from shoal import env
from shoal.process import import_path
command = [*import_path.python_command("shoal"), "--version"]
done = subprocess.run(command, env=env.child_environment({}), capture_output=True, text=True)
print(done.stdout + done.stderr)
"""


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """Return a folder of such files. Each writes a mark when it is run."""
    folder = tmp_path / "trap"
    folder.mkdir()
    for name in NAMES:
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'a').write('{name} ')\n")
    return folder


def marks(trap: Path) -> str:
    mark = trap.parent / "mark"
    return mark.read_text() if mark.exists() else ""


def run(*arguments: str, folder: Path, python_path: str = str(HOME)) -> str:
    environment = {**os.environ, "PYTHONPATH": python_path}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# The ways in which the folder gets onto the parent's path, after the parent has loaded the modules that it needs.
WAYS = {
    "interactive": "sys.path.insert(0, '')",
    "by its name": "sys.path.insert(0, {trap!r})",
    "a link to it": "os.symlink({trap!r}, {trap!r} + '-link'); sys.path.insert(0, {trap!r} + '-link')",
    "PYTHONPATH=.": "os.environ['PYTHONPATH'] = '.' + os.pathsep + {home!r}; sys.path.insert(0, {trap!r})",
    "an empty entry": "os.environ['PYTHONPATH'] = os.pathsep + {home!r}",
    "elsewhere by now": "sys.path.insert(0, {trap!r}); os.chdir('/')",
    "script": "sys.path.insert(0, {trap!r}); os.chdir('/'); sys.modules['__main__'].__file__ = {trap!r} + '/script.py'",
}


@pytest.mark.parametrize("way", WAYS)
def test_a_child_does_not_look_into_the_working_directory(trap: Path, way: str) -> None:
    prepare = WAYS[way].format(trap=str(trap), home=str(HOME))
    load = "import os, sys, subprocess, json, site, glob, sysconfig, shoal.env, shoal.process.import_path, shoal.errors"
    assert "shoal, version" in run("-P", "-c", f"{load}\n{prepare}\n{START}", folder=trap)
    assert marks(trap) == ""


def archive_of_the_package(folder: Path) -> Path:
    found = folder / "app.pyz"
    with zipfile.ZipFile(found, "w") as file:
        for path in (HOME / "shoal").rglob("*.py"):
            file.write(path, path.relative_to(HOME))
    return found


def installed_into(folder: Path) -> Path:
    """Make a folder as `pip install --target` does."""
    (folder / "shoal").symlink_to(HOME / "shoal")
    (folder / "shoal-0.1.0.dist-info").mkdir()
    return folder


@pytest.mark.parametrize("place", [lambda folder: HOME, archive_of_the_package, installed_into])
@pytest.mark.parametrize("flags", [("-I",), ("-P",), ()])
def test_a_child_finds_shoal_where_its_parent_has(
    tmp_path: Path, place: Callable[[Path], Path], flags: tuple[str, ...]
) -> None:
    """Shoal is in a folder that is not on the path by default, or in the working directory, which is not searched."""
    found = place(tmp_path)
    program = f"import sys; sys.path.insert(0, {str(found)!r})\n{START}\nprint(import_path.__file__)"
    output = run(*flags, "-c", program, folder=found if found.is_dir() else tmp_path, python_path="")
    assert "shoal, version" in output
    assert str(found) in output


def test_folders_that_a_parent_has_added_are_kept_in_order(tmp_path: Path) -> None:
    program = (
        f"import sys; sys.path.insert(1, {str(tmp_path)!r}); sys.path.append({str(tmp_path / 'last')!r})\n"
        "from shoal.process import import_path\n"
        f"assert import_path.safe_folders(sys.path) == [each for each in sys.path if each], sys.path"
    )
    run("-c", program, folder=Path("/"))


def test_a_model_in_the_working_directory(trap: Path) -> None:
    """Ranks, engines and API servers do not run the files beside the model."""
    (trap / "shoal.py").unlink()
    for file in (HOME / "shoal" / "demo_model").iterdir():
        (trap / file.name).symlink_to(file)
    shared = ("--max-model-len", "64", "--kv-cache-memory-bytes", "2MiB")
    program = ("-P", "-c", "import sys; from shoal.cli.main import main; sys.path.insert(0, ''); main()")
    asked = ("generate", ".", "-tp", "2", "--prompt", "Once", "--max-tokens", "3", *shared)
    assert run(*program, *asked, folder=trap).startswith("Once upon")
    command = (".", "--data-parallel-size", "2", "--api-server-count", "2", *shared)
    with ShoalServer(*command, folder=trap, program=program) as server:
        assert server.get("/v1/models")["data"]
    assert marks(trap) == ""
