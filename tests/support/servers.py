"""Real servers, as separate processes."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import msgspec

_START_S = 120.0
_END_S = 60.0
_POLL_S = 0.05


class ShoalServer:
    """`shoal serve --port 0 ...` in a separate session. The constructor waits until it is ready."""

    def __init__(
        self,
        *arguments: str,
        environment: dict[str, str] | None = None,
        prefix: Sequence[str] = (),
        folder: Path | None = None,
        program: Sequence[str] = ("-m", "shoal"),
    ) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the server
        self.process = subprocess.Popen(
            [*prefix, sys.executable, *program, "serve", "--port", "0", *arguments],
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **(environment or {})},
            cwd=folder,
            start_new_session=True,
        )
        try:
            self.url = self._await_url()
        except BaseException:
            self.kill()
            raise

    def _await_url(self) -> str:
        assert self.process.stdout is not None
        fd = self.process.stdout.fileno()
        os.set_blocking(fd, False)
        told, deadline = b"", time.monotonic() + _START_S
        while not (found := re.search(rb" at (https?://\S+)\n", told)):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"no server came up (exit code {self.process.poll()}): {self.log()}")
            time.sleep(_POLL_S)
            try:
                told += os.read(fd, 65536)
            except BlockingIOError:
                continue
        return found[1].decode()

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read().decode("utf-8", "replace")

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return msgspec.json.decode(answer.read())

    def status(self) -> Any:
        return self.get("/v1/admin/status")

    def pids(self) -> set[int]:
        """Return the ids of all processes of its session that have not ended."""
        found = set()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                except OSError:
                    continue
                if int(session) == self.process.pid and state != "Z":  # orphans wait for the init of a container
                    found.add(int(entry.name))
        return found

    def stop(self, number: int = signal.SIGTERM, timeout: float = _END_S) -> int:
        """Send the signal `number`, wait for the end, and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout)

    def kill(self) -> None:
        for pid in self.pids():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(_END_S)
        cast(Any, self.process.stdout).close()
        self._log.close()

    def __enter__(self) -> "ShoalServer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is not None:
            print(self.log()[-8000:], file=sys.stderr)
        self.kill()
