"""`shoal top`: the tables, and waiting for a server that goes away."""

import io
import os
import pty
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from rich.console import Console

from shoal.client import top
from shoal.client.status_history import StatusHistory
from shoal.client.top_screen import screen
from shoal.errors import UserError
from shoal.server.operations.status import status_json
from shoal.wire.base import replace_fields
from shoal.wire.fleet import FleetStatus
from support.fleet_status import engine, fleet, ranks, replica
from support.status_server import StatusServer

CAUSE = "rank 1 (process 101, last step 9, computing) was killed by SIGKILL"


def shown(history: StatusHistory, *, width: int = 160, lines: int | None = None, trouble: str = "") -> str:
    console = Console(file=io.StringIO(), width=width, height=100)
    console.print(screen(history, width=width, lines=lines, trouble=trouble))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def read(*statuses: FleetStatus) -> StatusHistory:
    history = StatusHistory()
    for status in statuses:
        history.add(status_json(status))
    return history


def row(text: str, begin: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(begin))


def test_the_figures_are_shown() -> None:
    def at(uptime: float, tokens: int) -> FleetStatus:
        of_ranks = ranks(2, 1, busy_us=int(0.4e6 * uptime))
        stats = engine(
            running=12, waiting=3, free=58, prompt=tokens, generated=2 * tokens, queries=200, hits=50, of_ranks=of_ranks
        )
        return fleet(replica(0, host="alpha", since=uptime, stats=stats), uptime=uptime, queued=7, replays=1)

    text = shown(read(at(10, 0), at(11, 500), at(12, 1000)))

    assert row(text, "tiny").startswith("tiny  serving  1 of 1 replica ready, tp 2, pp 1, up for 12 s")
    assert "12 running, 3 waiting, 7 queued  1,000 tokens/s out, 500 in  prefix hits 25 %  0 restarts, 1 replay" in text
    assert row(text, "0        alpha").split() == (
        ["0", "alpha", "ready", "12", "s", "12", "3", "0", "████░░░░░░", "42", "%", "25", "%", "1,000", "500", "0"]
    )
    rank = row(text, "0           1")
    assert rank.split() == (
        ["0", "1", "0", "101", "alpha", "████░░░░░░", "40", "%", "2.0", "MiB", "256", "KiB", "512", "KiB"]
    )


def test_the_failure_of_a_replica_is_shown() -> None:
    down = replica(1, "restarting", restarts=2, cause=CAUSE, stats=engine(running=5, waiting=4, of_ranks=ranks()))
    text = shown(read(fleet(replica(0, stats=engine(running=1, of_ranks=ranks())), down)))
    assert f"replica 1 ended: {CAUSE}" in text
    assert "1 of 2 replicas ready" in text
    assert "1 running, 0 waiting" in text, "gauges of an engine that has ended are not shown"
    assert "2 restarts" in text
    assert not [line for line in text.splitlines() if line.startswith("1") and "101" in line], (
        "ranks of an engine that has ended are not shown"
    )


def test_states_of_the_server() -> None:
    assert "draining" in shown(read(fleet(replica(0), accepting=False)))
    assert "no replica is ready" in shown(read(fleet(replica(0, "starting"))))
    failed = replace_fields(fleet(replica(0, "failed"), accepting=False), failure="no replica is left")
    assert "failed: no replica is left" in shown(read(failed))


@pytest.mark.slow
def test_replicas_and_ranks_that_do_not_fit_are_counted() -> None:
    many = fleet(*(replica(n, stats=engine(of_ranks=ranks(4))) for n in range(400)), tp=4)
    text = shown(read(many), lines=40)
    assert len(text.splitlines()) <= 40
    assert "and 385 more replicas" in text
    assert "and 1,585 more ranks" in text
    assert len(shown(read(many)).splitlines()) > 2000


def test_80_columns_show_the_important_columns() -> None:
    down = replica(
        1, "restarting", host="a-host-with-a-very-long-name.example.org", cause="x", stats=engine(generated=1)
    )
    busy = replica(0, since=123456, restarts=12, stats=engine(running=2048, waiting=9999, free=58, of_ranks=ranks()))
    text = shown(read(fleet(busy, down, uptime=1), fleet(busy, down, uptime=2)), width=80)
    assert "…" not in text
    assert row(text, "0").split() == ["0", "ready", "2,048", "9,999", "████░░░░░░", "42", "%", "-", "0", "0", "12"]


def test_trouble_is_shown_first() -> None:
    assert shown(read(fleet(replica(0))), trouble="no server at x").startswith("no server at x")


@pytest.fixture
def server() -> Iterator[StatusServer]:
    begun = time.monotonic()

    def now() -> FleetStatus:
        up = time.monotonic() - begun
        return fleet(replica(0, stats=engine(generated=int(300 * up), of_ranks=ranks())), uptime=up)

    with StatusServer(now) as server:
        yield server


def test_without_a_terminal_the_status_is_printed_once(server: StatusServer) -> None:
    console = Console(file=io.StringIO(), width=160)
    top.show_status(server.url, interval=0.2, console=console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert text.count("tiny") == 1
    assert "tokens/s out" in text
    assert " - tokens/s out" not in text
    assert server.asked == ["/v1/admin/status"] * 2


def test_the_api_key_is_sent(server: StatusServer) -> None:
    server.key = "secret"
    console = Console(file=io.StringIO(), width=160)
    with pytest.raises(UserError, match="--api-key"):
        top.show_status(server.url, once=True, interval=0.1, console=console)
    top.show_status(server.url, once=True, interval=0.1, api_key="secret", console=console)


class Terminal:
    """A `shoal top` process on a terminal."""

    def __init__(self, url: str) -> None:
        self.controller, terminal = pty.openpty()
        self.text = ""
        self._more = threading.Condition()
        command = ["setsid", "--ctty", sys.executable, "-m", "shoal", "top", url, "--interval", "0.1"]
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "160", "LINES": "40"}
        self.process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment)
        os.close(terminal)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            while data := os.read(self.controller, 65536):
                with self._more:
                    self.text += data.decode(errors="replace")
                    self._more.notify_all()
        except OSError:  # the process has ended
            pass

    def wait_for(self, words: str, *, after: str = "") -> None:
        """Wait until `words` come three times after the last `after`, so that the screen was drawn completely."""
        with self._more:
            found = self._more.wait_for(lambda: self.text.rpartition(after or "\0")[2].count(words) >= 3, 60)
            assert found, self.text[-2000:]

    def ended_well(self) -> bool:
        """Wait for the process. Return whether it ended with code 0 and restored the terminal."""
        with self._more:
            restored = self._more.wait_for(lambda: "\x1b[?1049l" in self.text, 60)
        return restored and self.process.wait(60) == 0

    def press(self, keys: bytes) -> None:
        os.write(self.controller, keys)


@pytest.fixture
def terminal(server: StatusServer) -> Iterator[Terminal]:
    terminal = Terminal(server.url)
    try:
        yield terminal
    finally:
        terminal.process.kill()
        terminal.process.wait(60)
        os.close(terminal.controller)


@pytest.mark.slow
@pytest.mark.parametrize("keys", [b"q", b"\x03"])
def test_on_a_terminal_it_runs_until_a_key(terminal: Terminal, keys: bytes) -> None:
    terminal.wait_for("tokens/s out")
    terminal.press(keys)
    assert terminal.ended_well()


@pytest.mark.slow
def test_top_waits_for_a_server_that_goes_away(server: StatusServer, terminal: Terminal) -> None:
    terminal.wait_for("tokens/s out")
    server.close()
    terminal.wait_for("connection refused; trying again for")
    server.open()
    terminal.wait_for("tokens/s out", after="trying again for")
    terminal.press(b"q")
    assert terminal.ended_well()
