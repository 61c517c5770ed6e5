"""scripts/run_cluster.sh with a `docker` that records its arguments and runs until its container is removed."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # starts processes

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "scripts" / "run_cluster.sh"

# `run` holds a pipe open until `rm` has removed the container, or ends at once with $DOCKER_RC.
DOCKER = """#!/bin/bash
echo "$*" >>"$RECORD"
case "$1" in
    container) [ -e "$FOLDER/container" ] ;;
    run)
        touch "$FOLDER/container"
        if [ -n "$DOCKER_RC" ]; then exit "$DOCKER_RC"; fi
        echo started
        read -r _ <"$FOLDER/pipe" ;;
    rm)
        rm -f "$FOLDER/container"
        if [ -z "$DOCKER_RC" ]; then echo >"$FOLDER/pipe"; fi ;;
esac
"""


class Docker:
    """A folder for PATH with a fake `docker`, and the record of its calls."""

    def __init__(self, folder: Path, *, gpus: bool = False, returns: str = "") -> None:
        self.folder = folder
        self._add("docker", DOCKER)
        self._add("nvidia-smi", f"#!/bin/sh\nexit {0 if gpus else 9}\n")
        os.mkfifo(folder / "pipe")
        (folder / "hub").mkdir()
        self._record = folder / "record"
        self._environment = {
            **{name: value for name, value in os.environ.items() if name not in ("SHOAL_CLUSTER_KEY", "HF_TOKEN")},
            "PATH": f"{folder}:{os.environ['PATH']}",
            "RECORD": str(self._record),
            "FOLDER": str(folder),
            "DOCKER_RC": returns,
        }

    def _add(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def calls(self) -> list[str]:
        return self._record.read_text().splitlines() if self._record.exists() else []

    def start(self, *arguments: str, **variables: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            ["env", "--default-signal=HUP", str(SCRIPT), *arguments],  # it may be ignored here, as by nohup
            env={**self._environment, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, **variables)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)


@pytest.fixture
def docker(tmp_path: Path) -> Docker:
    return Docker(tmp_path, returns="0")


def test_the_head_listens_for_workers(docker: Docker) -> None:
    hub = docker.folder / "hub"
    done = docker.run("shoal:ray", "10.0.0.1", "--head", str(hub))
    assert done.returncode == 0, done.stderr
    assert docker.calls() == [
        "container inspect node",
        f"run --name node --network host --shm-size 10gb -v {hub}:/huggingface -e HF_HOME=/huggingface"
        " --entrypoint /bin/bash shoal:ray -c ray start --block --head --port=6379 --node-ip-address=10.0.0.1",
        "rm -f node",
    ]


def test_a_worker_joins_the_head_with_the_given_arguments_of_docker(docker: Docker) -> None:
    docker.run("shoal:ray", "10.0.0.1", "--worker", str(docker.folder / "hub"), "-e", "NCCL_DEBUG=INFO")
    started = docker.calls()[1]
    assert started.endswith(
        " -e NCCL_DEBUG=INFO --entrypoint /bin/bash shoal:ray -c ray start --block --address=10.0.0.1:6379"
    )


def test_gpus_are_passed_where_there_are_any(tmp_path: Path) -> None:
    docker = Docker(tmp_path, gpus=True, returns="0")
    docker.run("shoal:ray", "10.0.0.1", "--head", str(tmp_path / "hub"))
    assert " --shm-size 10gb --gpus all -v " in docker.calls()[1]


def test_secrets_are_passed_by_name(docker: Docker) -> None:
    docker.run("shoal:ray", "10.0.0.1", "--head", str(docker.folder / "hub"), SHOAL_CLUSTER_KEY="a secret")
    assert " -e SHOAL_CLUSTER_KEY --entrypoint" in docker.calls()[1]
    assert "a secret" not in "".join(docker.calls())


def test_a_relative_folder_becomes_absolute(docker: Docker) -> None:
    hub = os.path.relpath(docker.folder / "hub")
    docker.run("shoal:ray", "10.0.0.1", "--head", hub)
    assert f" -v {docker.folder / 'hub'}:/huggingface " in docker.calls()[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_container_is_removed_when_the_shell_ends(tmp_path: Path, number: signal.Signals) -> None:
    docker = Docker(tmp_path)
    process = docker.start("shoal:ray", "10.0.0.1", "--head", str(tmp_path / "hub"))
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stdout, process.stderr:
        assert process.stdout.readline() == "started\n"
        process.send_signal(number)
        assert process.wait(60) == 128 + number
    assert docker.calls()[-1] == "rm -f node"
    assert not (tmp_path / "container").exists()


def test_the_exit_code_is_that_of_docker(tmp_path: Path) -> None:
    docker = Docker(tmp_path, returns="125")
    assert docker.run("shoal:ray", "10.0.0.1", "--head", str(tmp_path / "hub")).returncode == 125


def test_the_container_of_another_script_is_left_alone(docker: Docker) -> None:
    (docker.folder / "container").touch()
    done = docker.run("shoal:ray", "10.0.0.1", "--head", str(docker.folder / "hub"))
    assert done.returncode == 2
    assert "'docker rm -f node'" in done.stderr
    assert docker.calls() == ["container inspect node"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "4 arguments are needed, got 0"),
        (("shoal:ray", "10.0.0.1", "--head"), "4 arguments are needed, got 3"),
        (("shoal:ray", "10.0.0.1", "--leader", "."), "must be --head or --worker, got --leader"),
        (("shoal:ray", "10.0.0.1; reboot", "--head", "."), "must be an address or a name, got 10.0.0.1; reboot"),
        (("shoal:ray", "10.0.0.1", "--head", "/nowhere"), "HF_HOME must be a folder, and /nowhere is none"),
    ],
)
def test_a_mistake_is_refused_before_docker_is_called(docker: Docker, arguments: tuple[str, ...], message: str) -> None:
    done = docker.run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[0]
    assert "usage: scripts/run_cluster.sh" in done.stderr
    assert docker.calls() == []


def test_help_is_no_mistake(docker: Docker) -> None:
    done = docker.run("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: ")


@pytest.mark.skipif(not shutil.which("shellcheck", path=str(Path(sys.executable).parent)), reason="needs shellcheck")
def test_all_shell_scripts_pass_shellcheck() -> None:
    scripts = [*ROOT.glob("scripts/*"), ROOT / ".ci" / "run", ROOT / "deploy" / "image" / "entrypoint"]
    command = [str(Path(sys.executable).parent / "shellcheck"), *map(str, scripts)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout
