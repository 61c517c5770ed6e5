"""The image: its Dockerfile, and its entry point in a root that has only what the image has."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import shoal
from shoal.cli.commands import every_command
from support.hosts import free_port, obstacle

pytestmark = pytest.mark.slow  # starts processes

ROOT = Path(__file__).parent.parent.parent
IMAGE = ROOT / "deploy" / "image"
BIN = Path(sys.executable).parent
USER = "10001"
SMALL = ["--kv-cache-memory-bytes", "16MiB", "--max-model-len", "256"]
AS_USER = ["setpriv", "--reuid", USER, "--regid", USER, "--clear-groups", "--no-new-privs"]

# Mounts the root of a container at $1: read-only, with the system's programs, this checkout and its Python.
MAKE_ROOT = """
set -eu
root=$1; shift
mount -t tmpfs tmpfs "$root"
mkdir -p "$root/etc" "$root/dev/shm" "$root/proc" "$root/tmp" "$root/models" "$root/opt/bin"
for folder in tmp models dev/shm; do mount -t tmpfs -o mode=1777 tmpfs "$root/$folder"; done
for folder in {folders}; do
    mkdir -p "$root$folder" && mount --rbind "$folder" "$root$folder"
done
for name in bin lib lib64 sbin; do ln -s "usr/$name" "$root/$name"; done
cp {image}/entrypoint "$root/opt/bin/shoal-entrypoint"
cp {image}/healthcheck "$root/opt/bin/shoal-healthcheck"
for name in null zero urandom random; do
    touch "$root/dev/$name" && mount --bind "/dev/$name" "$root/dev/$name"
done
mount -t proc proc "$root/proc"
mount -o remount,ro "$root"
ip link set lo up
exec chroot "$root" "$@"
"""


def run(*command: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def missing() -> str:
    """Return why no root can be made here, or ""."""
    absent = [name for name in ("tini", "unshare", "nsenter", "setpriv", "chroot", "ip") if not shutil.which(name)]
    if absent:
        return f"needs {', '.join(absent)}"
    return obstacle()


needs_root = pytest.mark.skipif(bool(missing()), reason=missing())


@pytest.mark.skipif(not shutil.which("hadolint", path=str(BIN)), reason="needs hadolint")
def test_the_dockerfile_passes_its_linter() -> None:
    done = run(str(BIN / "hadolint"), str(ROOT / "deploy" / "Dockerfile"))
    assert done.returncode == 0, done.stdout


def test_what_the_dockerfile_copies_is_there_and_not_ignored() -> None:
    kept = [
        line[1:] for line in (ROOT / "deploy" / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"
    ]
    copies = [
        line.split()
        for line in (ROOT / "deploy" / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY ") and "--from" not in line
    ]
    sources = [word for words in copies for word in words[1:-1] if not word.startswith("--")]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(Path(source).is_relative_to(folder) for folder in kept), source


class FakePrograms:
    """A folder for PATH in which `shoal` and `ray` print what they are called with."""

    def __init__(self, folder: Path) -> None:
        for name in ("shoal", "ray"):
            (folder / name).write_text(f'#!/bin/sh\necho "{name} $*"\n')
            (folder / name).chmod(0o755)
        self._path = f"{folder}:{os.environ['PATH']}"

    def run(self, *arguments: str) -> str:
        command = ["env", f"PATH={self._path}", str(IMAGE / "entrypoint"), *arguments]
        return run(*command).stdout.strip()


@pytest.fixture
def programs(tmp_path: Path) -> FakePrograms:
    return FakePrograms(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "called"),
    [
        ("", "shoal"),
        ("serve", "shoal serve --host 0.0.0.0"),
        ("serve MODEL -tp 2", "shoal serve --host 0.0.0.0 MODEL -tp 2"),
        ("shoal serve MODEL", "shoal serve --host 0.0.0.0 MODEL"),
        ("--version", "shoal --version"),
        ("ray start --head", "ray start --head"),
        ("sh -c 'echo a shell'", "a shell"),
    ],
)
def test_the_entry_point_runs_shoal_or_another_program(programs: FakePrograms, arguments: str, called: str) -> None:
    assert programs.run(*shlex.split(arguments)) == called


@pytest.mark.parametrize("name", sorted(every_command()))
def test_the_entry_point_knows_every_command_of_shoal(programs: FakePrograms, name: str) -> None:
    assert programs.run(name).startswith(f"shoal {name}")


class Container:
    """The entry point as process 1 of new namespaces, as a user without rights, in a read-only root of its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        places = {BIN.parent, Path(sys.base_prefix), Path(shoal.__file__).parent}
        folders = " ".join(
            str(place) for place in ("/usr", "/sys", *sorted(places)) if not str(place).startswith("/usr/")
        )
        script = MAKE_ROOT.format(folders=folders, image=IMAGE)
        command = ["unshare", "--mount", "--pid", "--net", "--fork", "sh", "-c", script, "-", str(folder)]
        environment = {"PATH": f"/opt/bin:{BIN}:/usr/bin:/usr/sbin", "HF_HOME": "/models", "HOME": "/tmp"}
        self._log = (folder.parent / "log").open("w+b")
        self.process = subprocess.Popen(
            [*command, *AS_USER, "tini", "--", "shoal-entrypoint", *arguments],
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            text=True,
        )

    def await_line(self) -> str:
        """Return the first line that it prints; the log if it prints none."""
        assert self.process.stdout is not None
        return self.process.stdout.readline() or self.log()

    def log(self) -> str:
        return Path(self._log.name).read_text()

    @property
    def first_process(self) -> int:
        """The number of the container's process 1, as seen from outside."""
        pid = self.process.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def execute(self, *command: str) -> subprocess.CompletedProcess[str]:
        enter = ["nsenter", "--target", str(self.first_process), "--mount", "--pid", "--net", "--root", "--wd=/"]
        path = f"PATH=/opt/bin:{BIN}:/usr/bin"
        return run(*enter, "env", path, *AS_USER, *command)

    def close(self) -> None:
        if self.process.poll() is None:
            os.kill(self.first_process, signal.SIGKILL)  # ends all processes of the container
        self.process.wait(30)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._log.close()


@pytest.fixture
def container(tmp_path: Path) -> Iterator[Container]:
    (tmp_path / "root").mkdir()
    found = Container(tmp_path / "root", "serve", *SMALL)
    yield found
    found.close()


@needs_root
def test_the_entry_point_serves_is_healthy_and_drains_in_a_read_only_root(container: Container) -> None:
    assert container.await_line() == "Shoal serves bundled at http://127.0.0.1:8000\n"
    assert container.execute("cat", "/proc/1/comm").stdout == "tini\n"
    assert container.execute("shoal-healthcheck").returncode == 0
    assert " 00000000:1F40 " in container.execute("cat", "/proc/net/tcp").stdout, "it listens at all addresses"
    os.kill(container.first_process, signal.SIGTERM)
    assert container.process.wait(60) == 0, container.log()


def test_the_health_check_names_the_cause() -> None:
    url = f"http://127.0.0.1:{free_port()}/health"
    done = run("env", f"HEALTH_URL={url}", sys.executable, str(IMAGE / "healthcheck"))
    assert (done.returncode, done.stderr) == (1, f"{url}: <urlopen error [Errno 111] Connection refused>\n")
