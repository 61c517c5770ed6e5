"""A rank that dies is replaced alone: outputs are as without the death, and the other ranks keep what they have."""

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from shoal import LLM, SamplingParams
from shoal.errors import ClosedError, RankFailed
from shoal.params import StructuredOutputsParams
from support import processes
from support.hanging import HANGS_ON_SIGNAL

pytestmark = pytest.mark.slow  # starts processes

SMALL: dict[str, Any] = {
    "kv_cache_memory_bytes": "2MiB",
    "max_model_len": 256,
    "distributed_executor_backend": "mp",
}
PROMPTS: list[Any] = [{"prompt_token_ids": [5, 6, 7 + i]} for i in range(6)]
PARAMS = [
    SamplingParams(temperature=i % 2, seed=i, max_tokens=60, ignore_eos=True, logprobs=1 if i == 3 else None)
    for i in range(6)
]
WAIT_S = 60.0


@pytest.fixture(scope="module")
def folder(checkpoint: Callable[[str], Path]) -> str:
    return str(checkpoint("llama"))


@pytest.fixture(scope="module")
def pair(folder: str) -> Iterator[LLM]:
    """An engine with two tensor-parallel ranks, for all tests that do not end it."""
    with LLM(folder, tensor_parallel_size=2, **SMALL) as llm:
        yield llm


@pytest.fixture
def undisturbed(pair: LLM) -> list[tuple[int, ...]]:
    """What the engine generates. It shows that the ranks have worked since the last death, too."""
    return generate(pair)


def generate(llm: LLM) -> list[tuple[int, ...]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]


def pids(llm: LLM) -> list[int]:
    return [rank.pid for rank in llm.stats().ranks]


def until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline, what
        threading.Event().wait(0.005)


@contextlib.contextmanager
def running(llm: LLM) -> Iterator[Future[list[tuple[int, ...]]]]:
    """Yield the outputs that come while the block runs, which begins when the requests compute."""
    begun = llm.stats().steps
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(generate, llm)
        until(lambda: llm.stats().steps > begun + 5, "the requests begin")
        yield future
        future.result(WAIT_S)


def assert_replaced(llm: LLM, before: list[int], *bad: int) -> None:
    """Assert that only these ranks have new processes, and that each process has read its weights once."""
    ranks = llm.stats().ranks
    assert [rank.rank for rank in ranks if rank.pid != before[rank.rank]] == list(bad)
    assert {rank.loads for rank in ranks} == {1}


def test_outputs_are_the_same_when_a_rank_is_killed(folder: str, caplog: pytest.LogCaptureFixture) -> None:
    """First a rank of the first stage, then one of the last."""
    with LLM(folder, tensor_parallel_size=2, pipeline_parallel_size=2, **SMALL) as llm:
        expected = generate(llm)
        for turn, bad in enumerate((0, 2)):
            before = pids(llm)
            with running(llm) as outputs:
                os.kill(before[bad], signal.SIGKILL)
                assert outputs.result(WAIT_S) == expected
            assert_replaced(llm, before, bad)
            stats = llm.stats()
            assert stats.rank_replacements == turn + 1
            assert (stats.running, stats.waiting, stats.free_blocks) == (0, 0, stats.num_blocks)
            line = [record.getMessage() for record in caplog.records if "killed" in record.getMessage()][turn]
            says = "was killed by SIGKILL; it is replaced, the other ranks keep their weights"
            assert re.fullmatch(rf"rank {bad} \(process {before[bad]}, last step \d+, .*\) {says}", line)


def test_a_stopped_rank_is_replaced(pair: LLM, undisturbed: list[tuple[int, ...]]) -> None:
    before = pids(pair)
    with running(pair) as outputs:
        os.kill(before[1], signal.SIGSTOP)
        assert outputs.result(WAIT_S) == undisturbed
    assert_replaced(pair, before, 1)
    assert not Path(f"/proc/{before[1]}").exists()


def test_all_ranks_of_a_step_are_killed(pair: LLM, undisturbed: list[tuple[int, ...]]) -> None:
    before = pids(pair)
    with running(pair) as outputs:
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        assert outputs.result(WAIT_S) == undisturbed
    assert_replaced(pair, before, 0, 1)


def newcomer(before: list[int]) -> int:
    """Wait for the process that takes the place of a rank, and return it."""
    found: list[int] = []

    def is_there() -> bool:
        found[:] = set(workers()) - set(before)
        return bool(found)

    until(is_there, "a new process is started")
    return found[0]


def workers() -> list[int]:
    return [pid for pid in processes.children(os.getpid()) if b"shoal.worker" in command(pid)]


def command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has just ended
        return b""


@pytest.mark.parametrize("who", ["newcomer", "survivor"])
def test_a_rank_is_killed_while_another_is_replaced(pair: LLM, undisturbed: list[tuple[int, ...]], who: str) -> None:
    before = pids(pair)
    others = set(workers()) - set(before)
    with running(pair) as outputs:
        os.kill(before[1], signal.SIGKILL)
        new = newcomer([*before, *others])
        os.kill(new if who == "newcomer" else before[0], signal.SIGKILL)
        assert outputs.result(WAIT_S) == undisturbed
    assert_replaced(pair, before, *([1] if who == "newcomer" else [0, 1]))


def test_a_rank_is_killed_while_the_engine_is_paused(pair: LLM, undisturbed: list[tuple[int, ...]]) -> None:
    before = pids(pair)
    pair.sleep(0)
    os.kill(before[1], signal.SIGKILL)
    pair.wake_up()
    assert generate(pair) == undisturbed
    assert_replaced(pair, before, 1)


def test_ranks_that_die_again_and_again_end_the_engine(folder: str) -> None:
    """A request may be the cause: the fleet finds out which, and offline the caller gets an error."""
    with LLM(folder, tensor_parallel_size=2, **SMALL) as llm:
        known = set(workers())
        before = pids(llm)
        with ThreadPoolExecutor(1) as pool:
            outputs = pool.submit(generate, llm)
            os.kill(before[1], signal.SIGKILL)
            for _ in range(2):
                new = newcomer([*known])
                known.add(new)
                os.kill(new, signal.SIGKILL)
            with pytest.raises(RankFailed, match=r"rank 1 .*SIGKILL; ranks have died 3 times in a row before any step"):
                outputs.result(WAIT_S)
        with pytest.raises(ClosedError, match="the engine has failed: rank 1"):
            llm.stats()
        assert before[0] not in workers()


def test_a_last_stage_with_a_draft_model_is_killed(folder: str) -> None:
    draft = {"model": folder, "num_speculative_tokens": 3}
    with LLM(folder, pipeline_parallel_size=2, speculative_config=draft, **SMALL) as llm:
        expected, before = generate(llm), pids(llm)
        with running(llm) as outputs:
            os.kill(before[1], signal.SIGKILL)
            assert outputs.result(WAIT_S) == expected
        assert_replaced(llm, before, 1)


def test_a_rank_that_hangs_is_told_apart_from_those_that_wait_and_is_replaced(
    folder: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It computes for ever. The other rank waits for it in a collective, and keeps its process."""
    for name, value in HANGS_ON_SIGNAL.items():
        monkeypatch.setenv(name, value)
    with LLM(folder, tensor_parallel_size=2, **SMALL) as llm:
        expected, before = generate(llm), pids(llm)
        with running(llm) as outputs:
            os.kill(before[1], signal.SIGUSR1)
            begun = time.monotonic()
            until(lambda: bool(llm.stats().trouble), "the hang is found")
            assert time.monotonic() - begun < 10
            assert outputs.result(WAIT_S) == expected
        assert_replaced(llm, before, 1)
        assert llm.stats().trouble == ""
    (line,) = [record.getMessage() for record in caplog.records if "replaced" in record.getMessage()]
    says = r"does nothing in step \d+ \(steps like it took \d+.\d\d s at most\); rank 0 waits for that; it is replaced"
    assert re.match(rf"rank 1 \(process {before[1]}, last step \d+, .*\) {says}", line)


def test_structured_outputs_go_on_when_a_rank_is_killed() -> None:
    """Masks and verdicts that are on their way do not belong to the steps after the replacement."""
    asked = StructuredOutputsParams(regex="[a-z0-9 ]{50,60}")
    params = [SamplingParams(temperature=1, seed=seed, max_tokens=70, structured_outputs=asked) for seed in range(4)]

    def texts(llm: LLM) -> list[str]:
        return [output.outputs[0].text for output in llm.generate(["12 + 34 ="] * 4, params, use_tqdm=False)]

    with LLM(tensor_parallel_size=2, **SMALL) as llm, ThreadPoolExecutor(1) as pool:
        expected, before, begun = texts(llm), pids(llm), llm.stats().steps
        outputs = pool.submit(texts, llm)
        until(lambda: llm.stats().steps > begun + 5, "the requests begin")
        os.kill(before[1], signal.SIGKILL)
        assert outputs.result(WAIT_S) == expected
        assert all(re.fullmatch("[a-z0-9 ]{50,60}", text) for text in expected)
        assert_replaced(llm, before, 1)
