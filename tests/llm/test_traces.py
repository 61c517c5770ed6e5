"""Traces of an `LLM` and an `AsyncLLM`, over ranks that are threads."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal import LLM, AsyncLLM, SamplingParams
from shoal.errors import ConfigError, EngineError, UserError
from shoal.llm.comm_profile import replicas_of
from shoal.params import PromptDict
from shoal.wire.engine import EngineStats
from shoal.wire.traffic import traffic_since
from support.traces import Trace

WAIT_S = 60.0
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
PROMPTS = ["1 + 1 =", "Count from 3 to 9:", "37 + 45 ="]
LAYERS = 4  # of the bundled model
GRID = {
    "replica 0, rank 0 (tp 0, pp 0)": (0, 0),
    "replica 0, rank 1 (tp 1, pp 0)": (1, 0),
    "replica 0, rank 2 (tp 0, pp 1)": (0, 1),
    "replica 0, rank 3 (tp 1, pp 1)": (1, 1),
}


def threads(**more: Any) -> dict[str, Any]:
    return {"distributed_executor_backend": "threads", "kv_cache_memory_bytes": "8MiB", **more}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    options = threads(tensor_parallel_size=2, pipeline_parallel_size=2, pipeline_layer_partition=(3, 1))
    with LLM(trace=str(folder), **options) as found:
        yield found


def newest(folder: Path) -> Path:
    return max(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)


def recorded(llm: LLM, folder: Path) -> tuple[Trace, EngineStats, EngineStats]:
    """Return a trace of a run, with the stats of the engine before and after it."""
    llm.start_profile()
    before = llm.stats()
    llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    after = llm.stats()
    llm.stop_profile()
    return Trace(newest(folder)), before, after


def test_each_rank_has_a_track_with_all_of_its_steps_and_layers(llm: LLM, folder: Path) -> None:
    trace, before, after = recorded(llm, folder)
    assert {track for track in trace.tracks if "rank" in track} == set(GRID)
    numbers = sorted(int(each.name.split()[1]) for each in trace.of("schedule"))
    assert len(numbers) == len(set(numbers)) == after.steps - before.steps
    work = {each.name.split()[1]: each.args for each in trace.of("schedule")}
    assert sum(args["tokens"] for args in work.values()) == after.step_tokens - before.step_tokens
    for track, (_, stage) in GRID.items():
        steps = trace.of("step", track)
        assert {each.name.split()[1]: each.args for each in steps} == work
        inside = [
            [layer.name for layer in trace.of("layer", track) if step.begin <= layer.begin < step.end] for step in steps
        ]
        layers = range(3) if stage == 0 else range(3, LAYERS)
        assert inside == [[f"layer {layer}" for layer in layers]] * len(steps)
    for kind in ("launch", "apply"):
        assert sorted(int(each.name.split()[1]) for each in trace.of(kind)) == numbers


def test_operations_have_the_bytes_and_the_waits_of_the_profile(llm: LLM, folder: Path) -> None:
    trace, before, after = recorded(llm, folder)
    for rank, track in enumerate(GRID):
        earlier, later = ({each.rank: each for each in stats.ranks}[rank] for stats in (before, after))
        traffic = traffic_since(earlier.traffic, later.traffic)
        assert traffic
        sent, waited = Counter[tuple[str, str]](), 0.0
        for each in trace.of("operation", track):
            sent[each.args["axis"], each.name] += each.args["bytes"]
        assert dict(sent) == {(each.axis, each.operation): each.sent_bytes for each in traffic}
        waited = sum(each.duration for each in trace.of("wait", track))
        # The profile has whole microseconds for each operation; a wait is not shown beyond its operation.
        assert waited == pytest.approx(sum(each.waited_us or 0 for each in traffic), abs=len(traffic) + 0.05 * waited)
        assert {each.name for each in trace.of("wait", track)} <= {f"wait for rank {other}" for other in range(4)}


def test_requests_have_their_times_and_lanes(llm: LLM, folder: Path) -> None:
    trace, _, _ = recorded(llm, folder)
    requests = [each for each in trace.of("request") if each.name.startswith("request ")]
    assert [each.name for each in sorted(requests, key=lambda each: each.track)] == [
        f"request {number}" for number in range(3)
    ]
    assert len({each.track for each in requests}) == 3  # they overlap
    for each in requests:
        parts = [part for part in trace.of("request", each.track) if part is not each]
        assert [part.name for part in parts] == ["queue", "prompt", "decode"]
        assert sum(part.duration for part in parts) == pytest.approx(each.duration, abs=0.01)
        assert (each.args["output_tokens"], each.args["outcome"]) == (6, "length")


def test_only_one_trace_is_recorded_at_a_time(llm: LLM, folder: Path) -> None:
    with pytest.raises(ConfigError, match="no trace is recorded: begin one first with start_profile"):
        llm.stop_profile()
    llm.start_profile()
    with pytest.raises(ConfigError, match="a trace is recorded already: end it first with stop_profile"):
        llm.start_profile()
    llm.stop_profile()
    trace = Trace(newest(folder))
    assert (trace.of("step"), trace.facts["model"]) == ([], "bundled")
    assert all("the same clock" in each for each in trace.facts["clocks"].values())


def test_a_trace_from_the_start_ends_with_the_llm_and_at_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "run.json.gz"
    with LLM(trace=str(path), trace_events=60, **threads(distributed_executor_backend="uni")) as llm:
        llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)
        Trace(path)  # valid while it is recorded
    trace = Trace(path)
    assert trace.facts["notes"] == ["the trace ends at the limit of 60 events (--trace-events): it shows the beginning"]
    assert 60 <= len(trace.events) < 200
    assert trace.tracks >= {"replica 0, engine", "replica 0, rank 0 (tp 0, pp 0)"}


def test_replicas_that_share_experts_are_processes_of_one_trace(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    options = threads(data_parallel_size=2, enable_expert_parallel=True, trace=str(path), max_num_seqs=1)
    with LLM("bundled:moe", **options) as llm:
        before = [each.ranks[0].traffic for each in replicas_of(llm.stats())]
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        after = [each.ranks[0].traffic for each in replicas_of(llm.stats())]
    trace = Trace(path)
    for replica in range(2):
        track = f"replica {replica}, rank 0 (tp 0, pp 0)"
        steps = trace.of("step", track)
        assert len(steps) == len(trace.of("schedule", f"replica {replica}, engine"))
        shown = sum(each.args["bytes"] for each in trace.of("operation", track))
        assert shown >= sum(each.sent_bytes for each in traffic_since(before[replica], after[replica])) > 0
        assert trace.of("wait", track)
        assert {each.name for each in trace.of("wait", track)} == {f"wait for rank 0 of replica {1 - replica}"}
    assert {each.args["replica"] for each in trace.of("request") if each.name.startswith("request")} == {0, 1}


def test_an_engine_that_fails_leaves_a_valid_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"

    def fail(*_: Any) -> Any:
        raise RuntimeError("a broken kernel")

    with LLM(trace=str(path), **threads(tensor_parallel_size=2)) as llm:
        llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)
        monkeypatch.setattr("shoal.worker.runner.sample", fail)
        with pytest.raises(EngineError, match="a broken kernel"):
            llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)
    trace = Trace(path)
    assert "a broken kernel" in trace.facts["notes"][0]
    (unfinished,) = [each for each in trace.of("request") if each.args.get("outcome") == "has not ended"]
    assert unfinished.args["output_tokens"] == 0


def test_an_async_llm_begins_and_ends_traces(tmp_path: Path) -> None:
    async def scenario() -> None:
        options = threads(data_parallel_size=2, max_num_seqs=1)
        async with AsyncLLM(trace=str(tmp_path / "run.json"), **options) as llm:
            await llm.ready(WAIT_S)
            await run(llm, "before")
            first = await llm.stop_profile()
            with pytest.raises(UserError, match="no trace is recorded"):
                await llm.stop_profile()
            await run(llm, "between")
            await llm.start_profile()
            with pytest.raises(UserError, match="a trace is recorded already"):
                await llm.start_profile()
            await run(llm, "after")
            second = await llm.stop_profile()
            await llm.start_profile()
            await run(llm, "last")
        assert [first.file, second.file] == [str(tmp_path / name) for name in ("run.json", "run-1.json")]
        for name, file, events in (("before", "run", first.events), ("after", "run-1", second.events)):
            trace = Trace(tmp_path / f"{file}.json")
            assert len(trace.events) == events
            check(trace, name)
        check(Trace(tmp_path / "run-2.json"), "last")  # ended by the end of the AsyncLLM

    async def run(llm: AsyncLLM, name: str) -> None:
        async def one(number: int) -> None:
            async for _ in llm.generate(PROMPTS[0], GREEDY, f"{name}-{number}"):
                pass

        await asyncio.gather(*map(one, range(4)))

    def check(trace: Trace, name: str) -> None:
        requests = [each for each in trace.of("request") if each.name.startswith("request")]
        assert sorted(each.name for each in requests) == [f"request {name}-{number}" for number in range(4)]
        assert {each.args["replica"] for each in requests} == {0, 1}
        for replica in range(2):
            held = sum(each.args["replica"] == replica for each in requests)
            tokens = sum(each.args["tokens"] for each in trace.of("step", f"replica {replica}, rank 0 (tp 0, pp 0)"))
            assert tokens >= held * 6
        assert max(each.duration for each in trace.of("request") if each.name == "queue") > 0

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda folder: folder / "missing" / "run.json", "cannot be written: No such file or directory"),
        (lambda _: Path("/dev/null"), "is no regular file"),
        (lambda folder: written(folder / "notes.json", b'{"a": 1}'), "exists and is no trace"),
        (lambda folder: written(folder / "notes.json.gz", b'{"a": 1}'), "exists and is no trace"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_anything_starts(
    tmp_path: Path, make: Any, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.launch.open_model.plan_host", None)
    path = make(tmp_path)
    with pytest.raises(ConfigError, match=f"--trace {path} {why}"):
        LLM(trace=str(path))


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_the_trace_of_a_program_that_was_killed_can_be_read(llm: LLM, folder: Path) -> None:
    llm.start_profile()
    llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    path = newest(folder)
    copy = path.read_bytes()  # as a killed process leaves it
    llm.stop_profile()
    at_kill = folder / "copy.json.gz"
    at_kill.write_bytes(copy)
    assert json.dumps(Trace(at_kill).facts["model"]) == '"bundled"'


def test_a_model_through_transformers_shows_its_layers(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    options = threads(pipeline_parallel_size=2, model_impl="transformers", trace=str(path))
    with LLM(str(checkpoint("llama")), **options) as llm:
        prompt: PromptDict = {"prompt_token_ids": [5, 6, 7]}
        llm.generate(prompt, SamplingParams(temperature=0, max_tokens=2, detokenize=False), use_tqdm=False)
    trace = Trace(path)
    shown = [[each.name for each in trace.of("layer", f"replica 0, rank {rank} (tp 0, pp {rank})")] for rank in (0, 1)]
    assert len(shown[0]) > 1
    assert set(shown[0]) | set(shown[1]) == {f"layer {number}" for number in range(len(set(shown[0] + shown[1])))}
    assert set(shown[0]).isdisjoint(shown[1])
