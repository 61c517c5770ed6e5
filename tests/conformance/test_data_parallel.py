"""Tests of several replicas: they give the answers of one, even if replicas die."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conformance.test_greedy_tokens import make_prompts
from shoal import LLM, RequestOutput, SamplingParams
from shoal.errors import ClosedError, ReplicasFailed
from shoal.jobs.entries import JobEntry
from shoal.jobs.parameters import JobParameters
from shoal.jobs.run_job import JobRun
from shoal.params import BeamSearchParams
from support import processes

pytestmark = pytest.mark.slow

Checkpoint = Callable[[str], Path]

LENGTHS = [1, 3, 9, 17, 33, 5, 20, 12, 7, 26]
PROMPTS: list[Any] = [{"prompt_token_ids": tokens} for tokens in make_prompts(LENGTHS, seed=4)]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=2, prompt_logprobs=1),
    SamplingParams(temperature=0.9, top_p=0.9, seed=5, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=0.9, n=3, seed=6, max_tokens=8, ignore_eos=True, prompt_logprobs=0),
    SamplingParams(temperature=0, max_tokens=20, stop_token_ids=list(range(50, 150)), repetition_penalty=1.3),
]
MIXED = [PARAMS[i % len(PARAMS)] for i in range(len(PROMPTS))]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
HALF_WAY = SamplingParams(temperature=0.8, seed=7, max_tokens=16, ignore_eos=True, logprobs=0)
SIZE: dict[str, Any] = {"kv_cache_memory_bytes": "1MiB", "max_model_len": 96, "max_num_seqs": 6}
MANY = {**SIZE, "max_num_seqs": 20, "data_parallel_size": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "threads": {"data_parallel_size": 2, "distributed_executor_backend": "threads"},
    "threads-3-of-2": {
        "data_parallel_size": 3,
        "tensor_parallel_size": 2,
        "distributed_executor_backend": "threads",
    },
}


@pytest.fixture(scope="module")
def folder(checkpoint: Checkpoint) -> Path:
    return checkpoint("llama")


@pytest.fixture(scope="module")
def alone(folder: Path) -> Iterator[LLM]:
    with LLM(folder, **SIZE) as llm:
        yield llm


@pytest.fixture(scope="module")
def processes_of_two(folder: Path) -> Iterator[LLM]:
    """Two replicas, each an engine process with two ranks. Tests at the end kill them one by one."""
    with LLM(folder, **MANY, tensor_parallel_size=2) as llm:
        yield llm


@pytest.fixture(scope="module", params=[*LAYOUTS, "processes"])
def replicas(folder: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    if request.param == "processes":
        yield request.getfixturevalue("processes_of_two")
        return
    with LLM(folder, **SIZE, **LAYOUTS[request.param]) as llm:
        yield llm


def tokens_of(outputs: list[RequestOutput]) -> list[list[tuple[int, ...]]]:
    return [[each.token_ids for each in output.outputs] for output in outputs]


def test_the_answers_of_one(alone: LLM, replicas: LLM) -> None:
    expected = alone.generate(PROMPTS, MIXED, use_tqdm=False)
    found = replicas.generate(PROMPTS, MIXED, use_tqdm=False)
    assert [output.request_id for output in found] == [str(i) for i in range(len(PROMPTS))]
    assert tokens_of(found) == tokens_of(expected)
    for mine, theirs in zip(found, expected, strict=True):
        for a, b in zip(mine.outputs, theirs.outputs, strict=True):
            assert (a.finish_reason, a.stop_reason) == (b.finish_reason, b.stop_reason)
            assert a.cumulative_logprob == pytest.approx(b.cumulative_logprob, abs=1e-4)
            assert (a.logprobs is None) == (b.logprobs is None)
        assert (mine.prompt_logprobs is None) == (theirs.prompt_logprobs is None)
        assert len(mine.prompt_logprobs or ()) == len(theirs.prompt_logprobs or ())
    stats = replicas.stats()
    assert all(replica.steps for replica in stats.replicas), "each had something to do"
    assert [rank.rank for rank in stats.ranks] == list(range(len(stats.ranks)))
    assert (stats.running, stats.waiting, stats.free_blocks) == (0, 0, stats.num_blocks)


def test_fewer_prompts_than_replicas(alone: LLM, replicas: LLM) -> None:
    assert replicas.generate([], GREEDY, use_tqdm=False) == []
    one = replicas.generate(PROMPTS[3], GREEDY, use_tqdm=False)
    assert tokens_of(one) == tokens_of(alone.generate(PROMPTS[3], GREEDY, use_tqdm=False))


def test_beam_search(alone: LLM, replicas: LLM) -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=4)
    (mine,), (theirs,) = (llm.beam_search(PROMPTS[4], params) for llm in (replicas, alone))
    assert [each.tokens for each in mine.sequences] == [each.tokens for each in theirs.sequences]


def test_an_abandoned_run_leaves_all_replicas_usable(replicas: LLM) -> None:
    jobs = [replicas.prepare(i, PROMPTS[i % len(PROMPTS)], GREEDY) for i in range(40)]
    run = replicas.run(jobs)
    next(run)
    run.close()  # type: ignore[attr-defined]
    list(replicas.run(jobs[:2]))
    stats = replicas.stats()
    assert (stats.running, stats.waiting, stats.free_blocks) == (0, 0, stats.num_blocks)


def test_jobs_over_a_window(folder: Path) -> None:
    """There are more jobs than one replica would accept at a time."""
    params = SamplingParams(temperature=0.7, max_tokens=2, ignore_eos=True)
    entries = [JobEntry(i, f"line {i}", prompt={"prompt_token_ids": [5 + i % 200, 7, i % 11]}) for i in range(2500)]

    def run(llm: LLM) -> dict[int, tuple[int, ...]]:
        parameters = JobParameters(params, {}, llm.default_sampling_params)
        results = list(JobRun(llm, parameters, seed=3)(iter(entries), ordered=True))
        assert [entry.index for entry, _, _ in results] == list(range(len(entries)))
        return {entry.index: output.outputs[0].token_ids for entry, _, output in results}

    larger = {"kv_cache_memory_bytes": "4MiB", "max_model_len": 16}
    with LLM(folder, **larger, **LAYOUTS["threads"]) as llm:
        found = run(llm)
        assert min(replica.steps for replica in llm.stats().replicas) > 5
    with LLM(folder, **larger) as llm:
        assert found == run(llm)


# --- deaths ------------------------------------------------------------------------------------------------------

COUNT = 120


def prompts(count: int) -> list[Any]:
    return [{"prompt_token_ids": [5 + i % 290, 6 + i % 7, 7]} for i in range(count)]


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[tuple[int, ...]]]:
    with LLM(folder, kv_cache_memory_bytes="8MiB", max_model_len=96) as llm:
        return tokens_of(llm.generate(prompts(COUNT), HALF_WAY, use_tqdm=False))


def run_and_signal(llm: LLM, victim: int, number: int, *more: int) -> list[RequestOutput]:
    """Run all prompts, and send the signal to the processes when half of them have ended. Each must end once."""
    jobs = [llm.prepare(i, prompt, HALF_WAY) for i, prompt in enumerate(prompts(COUNT))]
    found: dict[int, RequestOutput] = {}
    for index, output in llm.run(jobs):
        assert index not in found
        found[index] = output
        if len(found) == COUNT // 2:
            for pid in (victim, *more):
                os.kill(pid, number)
    assert all(len(output.outputs[0].logprobs or ()) == 16 for output in found.values())
    return [found[i] for i in range(COUNT)]


def engines_of(llm: LLM) -> list[int]:
    """Return the process of each replica's engine: the parent of its ranks."""
    parents = {rank: pid for pid in processes.children(os.getpid()) for rank in processes.children(pid)}
    return [parents[replica.ranks[0].pid] for replica in llm.stats().replicas]


def test_a_rank_of_a_replica_dies_half_way(processes_of_two: LLM, expected: list[list[tuple[int, ...]]]) -> None:
    llm = processes_of_two
    before = [[rank.pid for rank in replica.ranks] for replica in llm.stats().replicas]
    assert tokens_of(run_and_signal(llm, before[1][1], signal.SIGKILL)) == expected
    after = [[rank.pid for rank in replica.ranks] for replica in llm.stats().replicas]
    assert after[0] == before[0], "the other replica did not notice"
    assert after[1][0] == before[1][0], "the survivor keeps its weights"
    assert after[1][1] != before[1][1], "the dead rank was replaced"


def test_replicas_die_half_way_one_after_the_other(
    processes_of_two: LLM, expected: list[list[tuple[int, ...]]], caplog: pytest.LogCaptureFixture
) -> None:
    llm, engines = processes_of_two, engines_of(processes_of_two)
    with caplog.at_level("WARNING", "shoal"):
        assert tokens_of(run_and_signal(llm, engines[1], signal.SIGKILL)) == expected
    (warning,) = (record.getMessage() for record in caplog.records if record.name == "shoal.replicas")
    assert f"process {engines[1]}" in warning
    assert "unfinished requests go on at the 1 replica left" in warning
    assert len(llm.stats().replicas) == 1
    again = llm.generate(prompts(3), HALF_WAY, use_tqdm=False)
    assert len(again) == 3, "and goes on with fewer"
    check_that_finished_outputs_are_kept(llm, engines, expected)


def check_that_finished_outputs_are_kept(llm: LLM, engines: list[int], expected: list[list[tuple[int, ...]]]) -> None:
    """Kill the first replica, the only one that is left."""
    run = llm.run

    def deadly(*arguments: Any, **keywords: Any) -> Iterator[tuple[int, RequestOutput]]:
        for count, pair in enumerate(run(*arguments, **keywords)):
            yield pair
            if count == COUNT // 2:
                os.kill(engines[0], signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm, "run", deadly)
        with pytest.raises(ReplicasFailed) as caught:
            llm.generate(prompts(COUNT), HALF_WAY, use_tqdm=False)
    causes = "; ".join(f"replica {i} (process {pid}) was killed by SIGKILL" for i, pid in enumerate(engines))
    assert str(caught.value) == f"no replica is left: {causes}"
    assert COUNT // 2 < len(caught.value.outputs) < COUNT
    for index, output in caught.value.outputs.items():
        assert tokens_of([output]) == [expected[index]]
    with pytest.raises(ClosedError, match="no replica is left"):
        llm.generate(prompts(1), HALF_WAY, use_tqdm=False)


# --- replicas that share experts ---------------------------------------------------------------------------------

TOGETHER: dict[str, Any] = {"data_parallel_size": 2, "enable_expert_parallel": True}


@pytest.fixture(scope="module")
def together(checkpoint: Checkpoint) -> Iterator[LLM]:
    """Two replicas of two ranks, which share experts."""
    with LLM(checkpoint("mixtral"), **MANY, enable_expert_parallel=True, tensor_parallel_size=2) as llm:
        yield llm


@pytest.fixture(params=["threads", "threads-tp", "processes"])
def sharing(checkpoint: Checkpoint, request: pytest.FixtureRequest) -> Iterator[LLM]:
    if request.param == "processes":
        yield request.getfixturevalue("together")
        return
    tp = 2 if request.param == "threads-tp" else 1
    options = {**SIZE, **TOGETHER, "tensor_parallel_size": tp, "distributed_executor_backend": "threads"}
    with LLM(checkpoint("mixtral"), **options) as llm:
        yield llm


def test_replicas_that_share_experts(checkpoint: Checkpoint, sharing: LLM) -> None:
    with LLM(checkpoint("mixtral"), **SIZE) as llm:
        expected = tokens_of(llm.generate(PROMPTS, MIXED, use_tqdm=False))
    assert tokens_of(sharing.generate(PROMPTS, MIXED, use_tqdm=False)) == expected
    # One replica has no work, but computes every step.
    assert tokens_of(sharing.generate(PROMPTS[:1], MIXED[:1], use_tqdm=False)) == expected[:1]
    stats = sharing.stats()
    assert max(replica.steps for replica in stats.replicas) - min(replica.steps for replica in stats.replicas) <= 2
    again = sharing.stats()
    assert again.steps - stats.steps <= 2, "at rest nobody takes steps"


@pytest.mark.parametrize(
    ("number", "bad"), [(signal.SIGKILL, [1, 2]), (signal.SIGSTOP, [0])], ids=["two killed", "one stopped"]
)
def test_a_rank_that_holds_experts_of_several_replicas_is_replaced_alone(
    together: LLM, number: int, bad: list[int]
) -> None:
    jobs = [together.prepare(i, prompt, HALF_WAY) for i, prompt in enumerate(prompts(COUNT))]
    expected = tokens_of([output for _, output in sorted(together.run(jobs), key=lambda pair: pair[0])])
    before = together.stats()
    victims = [before.ranks[rank].pid for rank in bad]
    assert tokens_of(run_and_signal(together, victims[0], number, *victims[1:])) == expected
    after = together.stats()
    pids = [(rank.pid, earlier.pid) for rank, earlier in zip(after.ranks, before.ranks, strict=True)]
    assert [i for i, (now, then) in enumerate(pids) if now != then] == bad, "all others keep their processes"
    assert {rank.loads for rank in after.ranks} == {1}, "and their weights"
    assert after.rank_replacements - before.rank_replacements == len(bad)
    assert len(after.replicas) == 2
    assert (after.running, after.waiting, after.free_blocks) == (0, 0, after.num_blocks)


def test_the_end_of_an_engine_ends_those_that_share_its_experts(together: LLM) -> None:
    bad = together.stats().ranks[-1].pid
    (engine,) = (pid for pid in processes.children(os.getpid()) if bad in processes.children(pid))
    run = together.run([together.prepare(i, prompt, GREEDY) for i, prompt in enumerate(prompts(50))])
    next(run)
    os.kill(engine, signal.SIGKILL)
    says = rf"^replica 1 \(process {engine}\) was killed by SIGKILL; replicas that share experts end together"
    with pytest.raises(ReplicasFailed, match=says):
        list(run)
    with pytest.raises(ClosedError, match="was killed by SIGKILL"):
        together.stats()
