"""Jobs that end half-way and are resumed. Whatever was lost, in the end the file has one line for each prompt."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import RequestError, UserError
from shoal.jobs.entries import JobEntry, digest, same_prompt
from shoal.jobs.output_file import OutputFailed, OutputFile
from shoal.jobs.output_lines import output_line
from shoal.jobs.parameters import JobParameters
from shoal.jobs.resume import AnsweredPrompts, ResumeCheck, drop_failed_lines, scan_answers, verify_answers
from shoal.jobs.run_job import JobRun
from shoal.outputs import CompletionOutput, RequestOutput
from shoal.params import Message, Prompt, SamplingParams
from shoal.text.prompts import Job, RefusedPrompt
from support.fakes import steady


class FakeEngine:
    """Answers each prompt with its text backwards, the last of a window first. Refuses the prompt "refuse"."""

    def __init__(self, window: int = 3) -> None:
        self.window = window
        self.jobs: list[Job] = []

    def prepare(self, index: int, prompt: Prompt, params: SamplingParams) -> Job:
        if prompt == "refuse":
            raise RequestError("refused")
        return Job(index, str(prompt), (1, 2), params)

    def prepare_chat(self, index: int, messages: Any, params: SamplingParams, **template: Any) -> Job:
        return self.prepare(index, messages[0]["content"], params)

    def run(self, jobs: Iterable[Job | RefusedPrompt], *, ordered: bool = False) -> Iterator[tuple[int, RequestOutput]]:
        waiting: list[Job | RefusedPrompt] = []
        for job in jobs:
            waiting.append(job)
            if len(waiting) == self.window:
                yield self._answer(waiting.pop(0 if ordered else -1))
        for job in waiting:
            yield self._answer(job)

    def _answer(self, job: Job | RefusedPrompt) -> tuple[int, RequestOutput]:
        if isinstance(job, RefusedPrompt):
            return job.index, RequestOutput("", job.prompt, job.tokens, (), error=job.error)
        self.jobs.append(job)
        text = str(job.prompt)[::-1]
        return job.index, RequestOutput("", job.prompt, job.tokens, (CompletionOutput(0, text, (3,), "stop"),))


PARAMETERS = JobParameters(SamplingParams(temperature=0), {})


def entries_of(prompts: Iterable[str]) -> list[JobEntry]:
    return [JobEntry(index, f"line {index + 1}", prompt=prompt) for index, prompt in enumerate(prompts)]


def run_resume(
    path: Path, entries: list[JobEntry], parameters: JobParameters = PARAMETERS, *, ordered: bool = False, seed: int = 0
) -> list[str]:
    """Do what `shoal generate --resume` does, and return the prompts that were run."""
    engine = FakeEngine()
    with OutputFile(path) as output:
        answered = scan_answers(output)
        verify_answers(entries, ResumeCheck(output, answered, parameters, seed=seed))
        output.start(drop_failed_lines(output, answered))
        check = ResumeCheck(output, answered, parameters, seed=seed)
        run = JobRun(engine, parameters, seed=seed)
        for entry, found, result in run(entries, ordered=ordered, skip=check.answered, finish=check.finish):
            output.write(output_line(entry, found, result, "m"))
    return [str(job.prompt) for job in engine.jobs]


def indices(path: Path) -> list[int]:
    return [json.loads(line)["index"] for line in path.read_bytes().splitlines()]


PROMPTS = ["a", "b\u2028", "refuse", "c", "d" * 9, "e", "refuse", "f"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "out.jsonl"
    assert len(run_resume(path, entries_of(PROMPTS))) == 6
    return path.read_bytes()


@steady
@given(st.data())
def test_a_file_cut_anywhere_is_completed_to_the_same_lines(
    tmp_path_factory: pytest.TempPathFactory, whole: bytes, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("cut") / "out.jsonl"
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    kept = [line for line in whole[:cut].splitlines(keepends=True) if line.endswith(b"\n") and b'"error"' not in line]
    ran = run_resume(path, entries_of(PROMPTS))
    assert len(ran) == 6 - len(kept)
    assert path.read_bytes().startswith(b"".join(kept)), "finished lines are unchanged"
    assert sorted(path.read_bytes().splitlines()) == sorted(whole.splitlines())
    assert run_resume(path, entries_of(PROMPTS)) == []


def test_a_small_file_cut_at_every_byte_is_completed_to_the_same_lines(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    run_resume(path, entries_of("ab"))
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        run_resume(path, entries_of("ab"))
        assert sorted(path.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_ordered_lines_are_in_order(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    run_resume(path, entries_of("abcdefg"))
    assert indices(path) != list(range(7))
    path.unlink()
    run_resume(path, entries_of("abcd"), ordered=True)
    run_resume(path, entries_of("abcdefg"), ordered=True)
    assert indices(path) == list(range(7))


def test_lines_with_errors_run_again(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    run_resume(path, entries_of(["a", "refuse", "b"]))
    assert [json.loads(line).get("error") for line in path.read_text().splitlines()].count("refused") == 1
    assert run_resume(path, entries_of(["a", "mended", "b"])) == ["mended"]
    assert sorted(indices(path)) == [0, 1, 2]
    assert "refused" not in path.read_text()


def test_another_prompt_is_refused_and_the_file_is_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    run_resume(path, entries_of("abc"), ordered=True)
    before = path.read_bytes() + b'{"index": 2, "ha'
    path.write_bytes(before)
    with pytest.raises(UserError, match=r"out.jsonl, line 2 \(index 1\) answers another prompt than line 2: give the"):
        run_resume(path, entries_of("axc"))
    assert path.read_bytes() == before


def test_other_parameters_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    run_resume(path, entries_of("abc"), ordered=True)
    with pytest.raises(UserError, match=r"line 1 \(index 0\) was made with other sampling parameters"):
        run_resume(path, entries_of("abc"), JobParameters(SamplingParams(temperature=0), {"max_tokens": 5}))


def test_another_seed_is_refused_for_prompts_that_use_it(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    warm = JobParameters(SamplingParams(temperature=1), {})
    mine = [JobEntry(0, "line 1", prompt="a", sampling={"seed": 7}), JobEntry(1, "line 2", prompt="b")]
    for entries, parameters in [(mine[:1], warm), (entries_of("a"), PARAMETERS)]:  # own seed; greedy
        path.unlink(missing_ok=True)
        run_resume(path, entries, parameters, seed=1)
        assert run_resume(path, entries, parameters, seed=2) == []
    path.unlink()
    run_resume(path, mine, warm, ordered=True, seed=1)
    assert run_resume(path, mine, warm, seed=1) == []
    for seed in (0, 2):
        with pytest.raises(UserError, match=r"line 2 \(index 1\) was made with .* another --seed"):
            run_resume(path, mine, warm, seed=seed)


def test_more_answers_than_prompts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    run_resume(path, entries_of("abcd"))
    with pytest.raises(UserError, match="has 2 more answers than there are prompts, the last with index 3"):
        run_resume(path, entries_of("ab"))


@pytest.mark.parametrize(
    "line",
    [b"hello\n", b"[]\n", b"{}\n", b'{"index": -1}\n', b'{"index": true, "digest": "0"}\n', b'{"index": 0}\n',
     b'{"index": 0, "digest": "xyz"}\n', b'{"index": 0, "digest": 5}\n', b"\xff\n", b"\n", b"[" * 100_000 + b"\n",
     b'{"index": 0, "digest": "11112222333344445"}\n', b"notes", b"{}", b'{"id": 5', b'{"indices'],
)  # fmt: skip
def test_files_that_shoal_did_not_write_are_refused(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(line)
    with pytest.raises(UserError, match="line 1 was not written by `shoal generate`"):
        run_resume(path, entries_of("a"))
    assert path.read_bytes() == line


@pytest.mark.parametrize("cut", [b"{", b'{"index": 0', b'{"id": "batch_req-0000', b'{"id'])
def test_an_incomplete_last_line_of_ours_is_removed(tmp_path: Path, cut: bytes) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(cut)
    assert run_resume(path, entries_of("a")) == ["a"]
    assert indices(path) == [0]


def test_second_answers_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    run_resume(path, entries_of("ab"))
    whole = path.read_bytes()
    path.write_bytes(whole + whole)
    assert run_resume(path, entries_of("ab")) == []
    assert path.read_bytes() == whole


def test_memory_does_not_grow_with_the_length_of_lines(tmp_path: Path) -> None:
    """A page has 4096 indices in 32 KiB, however far apart they are."""
    answered = AnsweredPrompts()
    for index in (0, 5, 4096, 10**12):
        answered.add(index, f"{index:016x}")
    assert [index in answered for index in (0, 1, 4096, 10**12, 10**12 + 1)] == [True, False, True, True, False]
    assert (answered.has(4096, f"{4096:016x}"), answered.has(4096, f"{5:016x}")) == (True, False)
    assert (answered.count, answered.largest_index, answered.held_bytes) == (4, 10**12, 3 * 32 << 10)


# --- digests of prompts -----------------------------------------------------------------------------------------

TALK: list[Message] = [{"role": "user", "content": "a"}]


def test_digests() -> None:
    params = SamplingParams(temperature=0, stop="x", logit_bias={3: 1.0})
    same = [JobEntry(0, "here", prompt="a"), JobEntry(5, "there", prompt="a", sampling={"n": 1})]
    alike = SamplingParams(temperature=0, stop=["x"], logit_bias={"3": 1})  # type: ignore[dict-item]
    assert digest(same[0], params, 0) == digest(same[1], alike, 0)
    others = [
        JobEntry(0, "", prompt="b"), JobEntry(0, "", messages=TALK), JobEntry(0, "", prompt={"prompt_token_ids": [1]}),
        JobEntry(0, "", prompt="a", ids={"custom_id": "1"}), JobEntry(0, "", prompt="a", endpoint="/v1/completions"),
        JobEntry(0, "", prompt="\ud800"), JobEntry(0, "", prompt={"prompt_token_ids": ["1", 1.5]}),  # type: ignore[arg-type]
    ]  # fmt: skip
    assert len({digest(entry, params, 0)[:10] for entry in [same[0], *others]}) == len(others) + 1
    assert not any(same_prompt(digest(entry, params, 0), digest(same[0], params, 0)) for entry in others)
    warmer = digest(same[0], SamplingParams(temperature=0.5), 0)
    assert warmer != digest(same[0], params, 0)
    assert same_prompt(warmer, digest(same[0], params, 0))


def test_draws_depend_on_seed_and_index(tmp_path: Path) -> None:
    """So a resumed job draws the same tokens, and with another seed it draws others."""

    def seeds(entries: list[JobEntry], seed: int) -> dict[int, int | None]:
        engine = FakeEngine()
        list(JobRun(engine, JobParameters(SamplingParams(temperature=1), {}), seed=seed)(entries))
        return {job.index: job.params.seed for job in engine.jobs}

    entries = [*entries_of("abc"), JobEntry(3, "", prompt="d", sampling={"seed": 7})]
    whole = seeds(entries, 0)
    assert len(set(whole.values())) == 4
    assert whole[3] == 7
    assert seeds(entries[1:], 0) == {index: whole[index] for index in (1, 2, 3)}
    assert seeds(entries, 1)[0] != whole[0]
    greedy = FakeEngine()
    list(JobRun(greedy, PARAMETERS, seed=0)(entries_of("a")))
    assert greedy.jobs[0].params.seed is None


def test_no_more_entries_than_the_window_are_pending() -> None:
    engine = FakeEngine(window=4)
    run = JobRun(engine, PARAMETERS, seed=0)
    most = 0
    for _ in run(JobEntry(index, "", prompt="a") for index in range(100)):
        most = max(most, run.unfinished)
    assert most <= 4
    assert run.unfinished == 0


# --- writing -----------------------------------------------------------------------------------------------------


def test_a_line_that_does_not_fit_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.jsonl"
    write, room = os.write, 40

    def full(fd: int, data: bytes) -> int:
        nonlocal room
        if not room:
            raise OSError(28, "No space left on device")
        written = write(fd, data[:room])
        room -= written
        return written

    with OutputFile(path) as output:
        output.start()
        output.write({"index": 0})
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OutputFailed, match=r"out.jsonl can't be written: No space left on device"):
            output.write({"index": 1, "text": "x" * 100})
    assert path.read_text() == '{"index": 0}\n'


def test_stdout_is_not_truncated_or_locked(tmp_path: Path) -> None:
    """It may be a file that holds something else: `shoal generate ... --output - >> file`."""
    path = tmp_path / "file"
    path.write_text("x\n")
    saved = os.dup(1)
    redirected = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        os.dup2(redirected, 1)
        with OutputFile("-") as output, OutputFile("-"):
            assert (output.regular, output.empty) == (False, True)
            output.start()
            output.write({"index": 0})
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(redirected)
    assert path.read_text() == 'x\n{"index": 0}\n'


def test_a_file_may_be_called_like_stdout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with OutputFile("./-") as output:
        output.start()
        output.write({"index": 0})
    assert (tmp_path / "-").read_text() == '{"index": 0}\n'


def test_surrogates_are_written_as_json_escapes(tmp_path: Path) -> None:
    with OutputFile(tmp_path / "out") as output:
        output.start()
        output.write({"text": "half \ud800 caf\xe9"})
    assert json.loads((tmp_path / "out").read_text("utf-8")) == {"text": "half \ud800 caf\xe9"}


def test_two_runs_can_not_write_to_one_file(tmp_path: Path) -> None:
    with OutputFile(tmp_path / "out"), pytest.raises(UserError, match="being written by another run"):
        OutputFile(tmp_path / "out")
    OutputFile(tmp_path / "out").close()


def test_replacing_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"before\n")
    path.chmod(0o640)

    def broken() -> Iterator[bytes]:
        yield b"half"
        raise OSError(28, "No space left on device")

    link = tmp_path / "link"
    link.symlink_to(path)
    with OutputFile(link) as output:
        with pytest.raises(UserError, match="No space left"):
            output.replace(broken())
        assert path.read_bytes() == b"before\n"
        assert output.replace(iter([b"{}\n"])) == 3
        output.start(keep=3)
        output.write({"a": 1})
    assert path.read_text() == '{}\n{"a": 1}\n'
    assert path.stat().st_mode & 0o777 == 0o640
    assert sorted(each.name for each in tmp_path.iterdir()) == ["link", "out"]
