"""The API key from an environment variable: the server requires it, our clients send it, and no child gets it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import requests

from support.servers import ShoalServer

pytestmark = pytest.mark.slow

WAIT_S = 100.0
KEY = "key-of-the-environment"


def descendants(pid: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # the process has ended
            continue
        if parent == pid:
            found += [int(folder.name), *descendants(int(folder.name))]
    return found


def status_with(server: ShoalServer, key: str | None) -> int:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return requests.get(f"{server.url}/v1/models", headers=headers, timeout=WAIT_S).status_code


def top(server: ShoalServer, **environment: str) -> "subprocess.CompletedProcess[str]":
    program = [sys.executable, "-m", "shoal", "top", "--once", server.url]
    inherited = {name: value for name, value in os.environ.items() if not name.endswith("_API_KEY")}
    env = {**inherited, **environment}
    return subprocess.run(program, env=env, capture_output=True, text=True, timeout=WAIT_S, check=False)


@pytest.mark.timeout(300)
def test_the_key_is_required_and_not_given_to_child_processes() -> None:
    options = ["--kv-cache-memory-bytes", "8MiB", "-tp", "2", "--api-server-count", "2"]
    with ShoalServer(*options, environment={"SHOAL_API_KEY": "", "VLLM_API_KEY": f"{KEY} other"}) as server:
        asked = [status_with(server, key) for key in (None, "wrong", KEY, "other")]
        assert asked == [401, 401, 200, 200]
        children = descendants(server.process.pid)
        assert len(children) >= 5  # two API servers, an engine, two ranks
        for child in children:
            assert KEY.encode() not in Path(f"/proc/{child}/environ").read_bytes()
            assert KEY.encode() not in Path(f"/proc/{child}/cmdline").read_bytes()
        assert top(server).returncode != 0
        for name in ("SHOAL_API_KEY", "VLLM_API_KEY"):
            found = top(server, **{name: KEY})
            assert found.returncode == 0, found.stderr
        assert KEY not in server.log()


@pytest.mark.timeout(300)
def test_the_flag_overrides_the_environment_variable() -> None:
    with ShoalServer("--kv-cache-memory-bytes", "8MiB", "--api-key", "a", environment={"SHOAL_API_KEY": KEY}) as server:
        assert [status_with(server, key) for key in (KEY, "a")] == [401, 200]
