"""A warm spare forks the process of a rank that dies, and is started again if it ends.

That programs leave no spares behind, however they end, is shown in `test_robustness`.
"""

import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal import LLM, SamplingParams
from support import processes

pytestmark = pytest.mark.slow  # starts processes

OPTIONS: dict[str, Any] = {"tensor_parallel_size": 2, "kv_cache_memory_bytes": "2MiB", "max_model_len": 256}
PROMPTS: list[Any] = [{"prompt_token_ids": [5, 6, 7 + i]} for i in range(4)]
PARAMS = [SamplingParams(temperature=i % 2, seed=i, max_tokens=60, ignore_eos=True) for i in range(4)]
WAIT_S = 120.0


@pytest.fixture(scope="module")
def folder(checkpoint: Callable[[str], Path]) -> str:
    return str(checkpoint("llama"))


@pytest.fixture(scope="module")
def llm(folder: str) -> Iterator[LLM]:
    """An engine with two ranks and a spare, for all tests."""
    with LLM(folder, warm_spares=1, **OPTIONS) as found:
        yield found


@pytest.fixture(autouse=True)
def _told(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    """Have the log say everything."""
    caplog.set_level(logging.INFO, "shoal")


def generate(llm: LLM) -> list[tuple[int, ...]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]


def ranks(llm: LLM) -> list[int]:
    return [rank.pid for rank in llm.stats().ranks]


def spares(llm: LLM) -> list[int]:
    """The processes of this one that are for ranks and are none. The engine sees to them whenever it is used."""
    used = ranks(llm)
    return [pid for pid in processes.children(os.getpid()) if is_worker(pid) and pid not in used]


def is_worker(pid: int) -> bool:
    try:
        return b"shoal.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has just ended
        return False


def until(holds: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline, what
        threading.Event().wait(0.05)


def next_spare(llm: LLM, *old: int) -> int:
    """Wait for the only spare that is none of the old ones, and return it."""
    found: list[int] = []

    def is_there() -> bool:
        found[:] = spares(llm)
        return len(found) == 1 and found[0] not in old

    until(is_there, "there is one spare")
    return found[0]


def test_a_spare_forks_the_process_of_each_rank_that_is_killed(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    expected, before, spare = generate(llm), ranks(llm), next_spare(llm)
    assert len(os.listdir(f"/proc/{spare}/task")) == 1  # a fork would lose other threads
    cores = [os.sched_getaffinity(pid) for pid in before]
    for rank in (1, 0):
        os.kill(before[rank], signal.SIGKILL)
        assert generate(llm) == expected
        after = ranks(llm)
        assert after[1 - rank] == before[1 - rank]
        assert after[rank] not in (before[rank], spare)
        assert [os.sched_getaffinity(pid) for pid in after] == cores
        assert f"rank {rank}: the warm spare, process {spare}, forks its new process" in caplog.text
        assert spares(llm) == [spare]
        before = after


def test_a_spare_that_is_stopped_is_not_used(llm: LLM) -> None:
    expected, before, spare = generate(llm), ranks(llm), next_spare(llm)
    os.kill(spare, signal.SIGSTOP)
    os.kill(before[0], signal.SIGKILL)
    assert generate(llm) == expected
    assert ranks(llm)[1] == before[1]
    assert not processes.is_running(spare)
    next_spare(llm, spare)


def test_ranks_outlive_their_spare_and_the_next_one_is_told_to_be_ready(
    llm: LLM, caplog: pytest.LogCaptureFixture
) -> None:
    expected, before, spare = generate(llm), ranks(llm), next_spare(llm)
    os.kill(spare, signal.SIGKILL)
    spare = next_spare(llm, spare)
    told = rf"a warm spare, process {spare}, is ready and takes [\d.]+ MiB of memory"
    until(lambda: spares(llm) == [spare] and re.search(told, caplog.text), "the spare has loaded everything")
    assert ranks(llm) == before
    assert generate(llm) == expected


def test_a_spare_that_ends_is_started_again_but_not_without_end(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    before, spare = ranks(llm), next_spare(llm)
    for _ in range(2):  # one has ended before
        os.kill(spare, signal.SIGKILL)
        spare = next_spare(llm, spare)
    assert "spares have ended" not in caplog.text
    os.kill(spare, signal.SIGKILL)
    told = "4 warm spares have ended, the last one was killed by SIGKILL: no more are started now"
    until(lambda: not spares(llm) and told in caplog.text, "the spare has ended")
    assert ranks(llm) == before
