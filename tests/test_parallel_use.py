"""An `LLM` that several threads use, that is interrupted, closed by another thread, and forked.

One program tests an engine of each kind after the other.
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from support.hosts import free_port

PROGRAM = """
import json, os, signal, sys, threading
from concurrent.futures import ThreadPoolExecutor
from shoal import LLM, BeamSearchParams, SamplingParams, ShoalError
from shoal.errors import ClosedError

signal.signal(signal.SIGINT, signal.default_int_handler)  # who started the tests may have it ignored
SHORT = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0, max_tokens=240, ignore_eos=True)
PROMPTS = [f"{a} + 8 =" for a in range(12)]
CHAT = [{"role": "user", "content": "3 + 4"}]

def texts(llm, prompts=PROMPTS[:2]):
    return [output.outputs[0].text for output in llm.generate(prompts, SHORT, use_tqdm=False)]

def chat(llm):
    return llm.chat(CHAT, SHORT, use_tqdm=False)[0].outputs[0].text

def beams(llm):
    (found,) = llm.beam_search("3 + 4 =", BeamSearchParams(beam_width=2, max_tokens=3))
    return [each.tokens for each in found.sequences]

def in_threads(llm):
    backwards = lambda: texts(llm, PROMPTS[::-1])[::-1]
    calls = [lambda: texts(llm, PROMPTS), backwards, lambda: chat(llm), lambda: beams(llm)]
    alone = [call() for call in calls]
    with ThreadPoolExecutor(8) as pool:
        together = [pool.submit(call) for call in calls * 2]
        llm.stats()
        return [each.result(60) for each in together] == alone * 2

def begun(llm):
    return llm.stats().running > 0

def interrupted(llm):
    # Several quickly behind each other, while it generates.
    def interrupt():
        while not begun(llm):
            pass
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        sent.set()
    sent = threading.Event()
    thread = threading.Thread(target=interrupt)
    came = False
    try:
        thread.start()
        while True:
            llm.generate(PROMPTS, ENDLESS, use_tqdm=False)
    except KeyboardInterrupt:
        came = True
    while not sent.is_set():
        try:
            sent.wait(30)
        except KeyboardInterrupt:
            pass
    thread.join(30)
    return came

def forked(llm, leave):
    pid = os.fork()
    if pid == 0:
        try:
            texts(llm)
        except ClosedError as error:
            said = str(error)
        leave(f"belongs to process {os.getppid()}, from which this one ({os.getpid()}) was forked" in said)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def leave_by_exit(right):
    sys.exit(3 if right else 1)

def leave_by_close(right):
    llm.close()
    del globals()["llm"]
    os._exit(3 if right else 1)

def closed_elsewhere(llm):
    def close():
        while not begun(llm):
            pass
        llm.close()
    thread = threading.Thread(target=close)
    thread.start()
    try:
        while True:
            llm.generate(PROMPTS, ENDLESS, use_tqdm=False)
    except ClosedError as error:
        thread.join(30)
        return str(error)

def use(llm):
    found = {}
    before = texts(llm)
    found["threads"] = in_threads(llm)
    found["interrupted"] = interrupted(llm)
    found["after the interrupt"] = texts(llm) == before
    stats = llm.stats()
    found["left"] = stats.running + stats.waiting + stats.num_blocks - stats.free_blocks
    found["forked, exit"] = forked(llm, leave_by_exit)
    found["forked, close"] = forked(llm, leave_by_close)
    found["after the forks"] = texts(llm) == before
    found["closed"] = closed_elsewhere(llm)
    return found

if __name__ == "__main__":
    for name, options in json.loads(sys.argv[1]).items():
        llm = LLM(kv_cache_memory_bytes="8MiB", max_model_len=256, **options)
        print(json.dumps({"engine": name} | use(llm)), flush=True)
"""
KINDS: dict[str, dict[str, Any]] = {
    "uni": {},
    "mp": {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
    "engine-process": {"engine_process": True},
    "replicas-threads": {
        "tensor_parallel_size": 2,
        "data_parallel_size": 2,
        "distributed_executor_backend": "threads",
    },
    "replicas": {"data_parallel_size": 2},
}
RIGHT = {
    "threads": True,
    "interrupted": True,
    "after the interrupt": True,
    "left": 0,
    "forked, exit": 3,
    "forked, close": 3,
    "after the forks": True,
    "closed": "the engine was closed",
}


@pytest.mark.slow
def test_threads_interrupts_forks_and_closing_from_another_thread() -> None:
    ended = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PROGRAM, json.dumps(KINDS)],
        capture_output=True,
        text=True,
        check=False,
        timeout=220,
    )
    assert ended.returncode == 0, (ended.stdout, ended.stderr)
    found = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    assert found == [{"engine": name} | RIGHT for name in KINDS]


FORKS_OF_OTHERS = """
import asyncio, json, os, sys
from shoal import AsyncLLM, DataParallelRank, SamplingParams, ShoalError
from shoal.errors import ClosedError

SHORT = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)

async def text(llm):
    async for output in llm.generate("3 + 4 =", SHORT):
        pass
    return output.outputs[0].text

def said(call):
    try:
        call()
    except ClosedError as error:
        return f"belongs to process {os.getppid()}" in str(error)

def in_child(*calls):
    pid = os.fork()
    if pid == 0:
        os._exit(3 if all([said(call) for call in calls]) else 1)  # else the parent's event loop is closed with ours
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

if __name__ == "__main__":
    found = {}
    with DataParallelRank.from_environment() as job:
        with asyncio.Runner() as runner:
            for name in ("SHOAL_DP_RANK", "SHOAL_DP_SIZE", "SHOAL_DP_MASTER_PORT"):
                del os.environ[name]
            llm = AsyncLLM(kv_cache_memory_bytes="8MiB", max_model_len=256)
            before = runner.run(text(llm))
            job.share([1])

            async def asked():
                await llm.status()

            def closes():
                llm.close()
                job.close()
                job.gather({})

            found["child"] = in_child(lambda: asyncio.run(text(llm)), lambda: asyncio.run(asked()), closes)
            found["same"] = runner.run(text(llm)) == before
            found["ready"] = [each.restarts for each in runner.run(llm.status()).replicas]
            llm.close()
        found["gathered"] = job.gather({0: "mine"})
    print(json.dumps(found), flush=True)
"""


@pytest.mark.slow
def test_forks_of_an_async_llm_and_of_a_data_parallel_rank() -> None:
    ended = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKS_OF_OTHERS],
        env={**os.environ, "SHOAL_DP_RANK": "0", "SHOAL_DP_SIZE": "1", "SHOAL_DP_MASTER_PORT": str(free_port())},
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found == {"child": 3, "same": True, "ready": [0], "gathered": ["mine"]}
