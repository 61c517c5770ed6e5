"""Ranks that fail and cannot be replaced, and engines that end in all possible ways.

Nothing may hang, and nothing may be left behind. `test_rank_replacement.py` has ranks that are replaced.
"""

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from shoal import LLM, SamplingParams
from shoal.devices import cpu
from shoal.errors import ClosedError, EngineError, RankFailed
from shoal.executors.multiprocess import ProcessLinks
from shoal.wire.ranks import RankCall, StepPlan, Work
from support.plans import bare_plan, setup_of

pytestmark = pytest.mark.slow  # starts processes

SMALL: dict[str, Any] = {"tensor_parallel_size": 2, "kv_cache_memory_bytes": "2MiB", "max_model_len": 256}
SHORT = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=250, ignore_eos=True)
PROMPT: Any = {"prompt_token_ids": [5, 6, 7]}
DETECTED_S = 10.0
GONE_S = 60.0


def state(pid: int) -> str:
    """Return the letter for a process's state in /proc; "" if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[0]


def gone(pid: int) -> bool:
    return state(pid) in {"", "Z", "X"}


def workers_of(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                command, stat = (entry / "cmdline").read_bytes(), (entry / "stat").read_text()
                if b"shoal.worker" in command and int(stat.rpartition(")")[2].split()[1]) == parent:
                    found.append(int(entry.name))
    return sorted(found)


def wait_for(done: Callable[[], Any], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not (found := done()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(found)


@pytest.fixture(autouse=True)
def _no_worker_is_left() -> Iterator[None]:
    """Check that a test has ended all its workers, and kill those that are left."""
    before = set(workers_of(os.getpid()))
    yield
    left = set(workers_of(os.getpid())) - before
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not left


@pytest.fixture(scope="module")
def folder(checkpoint: Callable[[str], Path]) -> str:
    return str(checkpoint("llama"))


def pids(llm: LLM) -> list[int]:
    return [rank.pid for rank in llm.stats().ranks]


def tokens(llm: LLM) -> tuple[int, ...]:
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    return llm.generate(PROMPT, params, use_tqdm=False)[0].outputs[0].token_ids


def run_in_progress(llm: LLM) -> Iterator[Any]:
    """Return a run that has computed some steps, with many more to come."""
    run = llm.run([llm.prepare(0, PROMPT, SHORT), llm.prepare(1, PROMPT, LONG), llm.prepare(2, PROMPT, LONG)])
    assert next(run)[0] == 0
    return run


def assert_failed(llm: LLM, workers: Sequence[int], bad: int = 1) -> None:
    """Assert that every call raises the reason immediately, and that no worker is left."""
    assert all(gone(pid) for pid in workers)
    calls: list[Callable[[], object]] = [
        lambda: llm.generate(PROMPT, SHORT, use_tqdm=False),
        lambda: list(llm.run([llm.prepare(0, PROMPT, SHORT)])),
        llm.stats,
    ]
    for call in calls:
        begun = time.monotonic()
        with pytest.raises(ClosedError, match=f"the engine has failed: rank {bad}"):
            call()
        assert time.monotonic() - begun < 1
    llm.close()
    llm.close()


# --- ranks -------------------------------------------------------------------------------------------------------


def break_rank(llm: LLM, rank: int) -> None:
    """Send a step with an unknown sequence to this rank only."""
    engine: Any = llm.engine
    engine._executor._links.send(StepPlan(engine._incarnation, 10**6, (Work(12345, 0, 1, False),)), rank)


def test_a_rank_that_raises_ends_its_own_engine_only(folder: str) -> None:
    """It is not replaced, because it would raise again."""
    with LLM(folder, **SMALL) as other, LLM(folder, **SMALL) as llm:
        expected, workers = tokens(other), pids(llm)
        assert not set(workers) & set(pids(other))
        assert tokens(llm) == expected
        run = run_in_progress(llm)
        break_rank(llm, 1)
        begun = time.monotonic()
        with pytest.raises(RankFailed) as caught:
            list(run)
        assert time.monotonic() - begun < DETECTED_S
        message = str(caught.value)
        assert re.match(rf"rank 1 \(process {workers[1]}, last step \d+, .*\): KeyError: 12345$", message)
        assert_failed(llm, workers)
        assert tokens(other) == expected


@pytest.mark.parametrize(("tp", "bad"), [(1, 0), (2, 2)])
def test_a_failing_rank_of_a_pipeline_is_named(folder: str, tp: int, bad: int) -> None:
    options = {**SMALL, "pipeline_parallel_size": 2, "tensor_parallel_size": tp, "distributed_executor_backend": "mp"}
    with LLM(folder, **options) as llm:
        workers = pids(llm)
        run = run_in_progress(llm)
        break_rank(llm, bad)
        begun = time.monotonic()
        with pytest.raises(RankFailed) as caught:
            list(run)
        assert time.monotonic() - begun < DETECTED_S
        where = rf"rank {bad} \(process {workers[bad]}, last step \d+, .*\)"
        assert re.match(f"{where}: KeyError: 12345$", str(caught.value))
        assert_failed(llm, workers, bad)


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (signal.SIGKILL, r"was not started: process {pid} was killed by SIGKILL"),
        (signal.SIGSTOP, r"is stopped \(SIGSTOP or a debugger\); its last message was \d.\d s ago"),
    ],
)
def test_ranks_that_cannot_be_forked(folder: str, number: signal.Signals, says: str) -> None:
    """The process that forks them fails while it still loads."""
    before = set(workers_of(os.getpid()))
    with ThreadPoolExecutor(1) as pool:
        started: Future[LLM] = pool.submit(LLM, folder, **SMALL)
        assert wait_for(lambda: set(workers_of(os.getpid())) - before, 20)
        (pid,) = set(workers_of(os.getpid())) - before
        os.kill(pid, number)
        begun = time.monotonic()
        with pytest.raises(EngineError) as caught:
            started.result(timeout=30)
        assert time.monotonic() - begun < DETECTED_S
    message = str(caught.value)
    each = rf"rank \d \(to be forked by process {pid}, before its first step, \w.*?\) {says.format(pid=pid)}"
    assert re.fullmatch(f"{each}; {each}", message), message
    assert gone(pid)


def test_a_rank_that_cannot_allocate_its_cache(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache needs more address space than there is. As the planner is told otherwise, only the rank notices it."""
    endless = dataclasses.replace(cpu.discover(), host_memory_available=2**60)
    monkeypatch.setattr("shoal.planner.host_devices.cpu.discover", lambda count: endless)
    options = {**SMALL, "kv_cache_memory_bytes": 2**50}
    with pytest.raises(EngineError) as caught:
        LLM(folder, **options)
    message = str(caught.value)
    assert re.match(r"rank [01] \(process \d+, before its first step, .*\): .*(alloc|memory)", message), message
    assert len(message.splitlines()) == 1
    assert workers_of(os.getpid()) == []


def test_a_rank_that_dies_with_unread_messages() -> None:
    """Messages that cannot be sent any more must not hide which rank has died."""
    links = ProcessLinks([setup_of(bare_plan())])
    try:
        assert wait_for(lambda: links.receive(0.01) or re.match(r"process \d+", links.describe(0)), GONE_S)
        pid = int(re.findall(r"process (\d+)", links.describe(0))[0])
        os.kill(pid, signal.SIGSTOP)
        assert wait_for(lambda: state(pid) == "T", 5)
        links.send(RankCall(1, "load", bytes(8 << 20)))
        os.kill(pid, signal.SIGKILL)
        assert wait_for(lambda: gone(pid), 5)
        links.send(RankCall(2, "load"))
        with pytest.raises(RankFailed, match=rf"rank 0 \(process {pid}, .*was killed by SIGKILL"):
            links.receive(5.0)
    finally:
        links.close(failed=True)
        links.close(failed=True)


def test_an_engine_outlives_the_thread_that_made_it(folder: str) -> None:
    """It can be used after a run was closed early, too."""
    with ThreadPoolExecutor(1) as pool:
        llm = pool.submit(LLM, folder, **SMALL).result(timeout=60)
    try:
        workers, expected = pids(llm), tokens(llm)
        run = run_in_progress(llm)
        run.close()  # type: ignore[attr-defined]
        stats = llm.stats()
        assert (stats.running, stats.waiting) == (0, 0)
        assert stats.free_blocks == stats.num_blocks
        assert tokens(llm) == expected
        assert pids(llm) == workers
    finally:
        llm.close()
    llm.close()
    assert all(gone(pid) for pid in workers)
    with pytest.raises(ClosedError, match="was closed"):
        llm.stats()


# --- the process around an engine --------------------------------------------------------------------------------

PARENT = """
import signal
import sys
from shoal import LLM, SamplingParams

signal.signal(signal.SIGINT, signal.default_int_handler)  # the parent of the tests may have it ignored

if __name__ == "__main__":
    options = {"kv_cache_memory_bytes": "2MiB", "max_model_len": 256, "warm_spares": 1}
    llm = LLM(sys.argv[1], tensor_parallel_size=2, **options)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)

    def generate():
        return llm.generate({"prompt_token_ids": [5, 6, 7]}, params, use_tqdm=False)[0].outputs[0].token_ids

    print(*(rank.pid for rank in llm.stats().ranks), flush=True)
    for word in map(str.strip, sys.stdin):
        if word == "generate":
            print(*generate(), flush=True)
        elif word == "go on":
            print("going on", flush=True)
            while True:
                generate()
        elif word == "fail":
            raise RuntimeError("on purpose")
        elif word == "leave":
            break
"""


class Parent:
    """A program that has an engine of two ranks and a warm spare, and never closes it."""

    def __init__(self, folder: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PARENT, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.workers: list[int] = []  # the ranks in their order, and the spare
        self.sockets: set[str] = set()
        self.shared: set[str] = set()

    def started(self) -> None:
        self.workers = [int(pid) for pid in self.read().split()]
        self.workers += set(workers_of(self.process.pid)) - set(self.workers)
        assert len(self.workers) == 3
        for pid in [self.process.pid, *self.workers]:
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    self._note(os.readlink(fd))
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                self._note(line.partition("/")[1] + line.partition("/")[2])

    def _note(self, target: str) -> None:
        if target.startswith("/dev/shm/") and not target.endswith("(deleted)"):
            self.shared.add(target)
        if target.startswith("socket:["):
            self.sockets.add(target[len("socket:[") : -1])

    def say(self, word: str) -> None:
        assert self.process.stdin
        print(word, file=self.process.stdin, flush=True)

    def read(self) -> str:
        assert self.process.stdout
        assert self.process.stderr
        line = self.process.stdout.readline()
        return line if line else f"it ended: {self.process.stderr.read()}"

    def assert_nothing_is_left(self) -> None:
        """Assert that nothing of the program is left after a while."""
        assert wait_for(lambda: not self._left(), GONE_S), self._left()
        self.process.wait(GONE_S)  # it may have ended since `_left` asked for its code

    def _left(self) -> list[str]:
        pids = [self.process.pid, *self.workers]
        self.process.poll()
        left = [f"process {pid}: {state(pid)}" for pid in pids if not gone(pid)]
        # Sockets are checked even if all processes have ended, as some of their threads may still be ending.
        left += [f"listening socket {inode}" for inode in self.sockets & listening()]
        left += [path for path in self.shared if Path(path).exists()]
        names = [path.name for path in Path("/dev/shm").iterdir()] if Path("/dev/shm").exists() else []
        return left + [name for name in names if set(re.findall(r"\d+", name)) & set(map(str, pids))]

    def end(self) -> str:
        """Kill everything that is left, and return what the program wrote on stderr."""
        self.process.kill()
        for pid in self.workers:
            with contextlib.suppress(ProcessLookupError):
                if not gone(pid) and b"shoal.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
        _, err = self.process.communicate()
        return str(err)


def listening() -> set[str]:
    """Return the inodes of all listening TCP sockets."""
    found = set()
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A":
                    found.add(fields[9])
    return found


def kill(parent: Parent) -> None:
    parent.process.send_signal(signal.SIGKILL)


def interrupt(parent: Parent) -> None:
    parent.process.send_signal(signal.SIGINT)


def fail(parent: Parent) -> None:
    parent.say("fail")


def leave(parent: Parent) -> None:
    parent.say("leave")


@pytest.mark.parametrize(
    ("first", "second", "code"), [(kill, leave, 0), (interrupt, fail, 1)], ids=["kill-leave", "interrupt-fail"]
)
def test_programs_leave_nothing_behind_however_they_end(
    folder: str, first: Callable[[Parent], None], second: Callable[[Parent], None], code: int
) -> None:
    """The first program ends while it generates, with one of its ranks stopped. The second goes on, and ends later."""
    parents = [Parent(folder), Parent(folder)]
    try:
        for parent in parents:
            parent.started()
        a, b = parents
        b.say("generate")
        expected = b.read()
        assert len(expected.split()) == 20
        a.say("go on")
        assert a.read() == "going on\n"
        os.kill(a.workers[1], signal.SIGSTOP)
        assert wait_for(lambda: state(a.workers[1]) == "T", GONE_S)
        first(a)
        a.assert_nothing_is_left()
        assert a.process.returncode != 0
        assert not any(map(gone, b.workers))
        b.say("generate")
        assert b.read() == expected
        second(b)
        b.assert_nothing_is_left()
        assert b.process.returncode == code
    finally:
        told = [parent.end() for parent in parents]
    assert "Exception ignored" not in "".join(told)
    assert ("KeyboardInterrupt" in told[0]) == (first is interrupt)
    assert ("RuntimeError: on purpose" in told[1]) == (second is fail)
