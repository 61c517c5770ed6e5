"""Big jobs that are interrupted, killed or run on a full disk, and then resumed."""

import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from shoal.cli import generate as generate_module
from shoal.errors import RankFailed
from shoal.launch.open_model import OpenModel, open_model
from shoal.outputs import RequestOutput
from shoal.text.prompts import Job

Shoal = Callable[..., int]

# Few requests at a time, so that lines come one after the other.
SMALL = ["--kv-cache-memory-bytes", "2MiB", "--max-model-len", "64", "--max-num-seqs", "4", "--ignore-eos"]
COUNT = 60


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i} + 1 =", "custom_id": f"c{i}"}) + "\n" for i in range(COUNT)))
    return path


def command(prompts: Path, output: Path, *more: str) -> list[str]:
    return ["generate", "--prompts-file", str(prompts), "--output", str(output), "--max-tokens", "8", *SMALL, *more]


@contextmanager
def started(
    arguments: Sequence[str], *, log_level: str = "warning", **options: Any
) -> Iterator["subprocess.Popen[str]"]:
    environment = {**os.environ, "SHOAL_LOG_LEVEL": log_level}
    with subprocess.Popen(
        [sys.executable, "-m", "shoal", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def wait_for_lines(process: "subprocess.Popen[str]", output: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while not output.exists() or output.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no lines were written"
        time.sleep(0.01)


def children_of(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            if int(stat.rpartition(")")[2].split()[1]) == parent:
                found.append(int(entry.name))
    return found


def assert_whole(output: Path, count: int = COUNT) -> None:
    lines = [json.loads(line) for line in output.read_bytes().splitlines()]
    assert sorted(line["index"] for line in lines) == list(range(count))
    for line in lines:
        assert line["custom_id"] == f"c{line['index']}"
        assert line["prompt"] == f"{line['index']} + 1 ="
        assert len(line["outputs"][0]["token_ids"]) == 8


def interrupt(process: "subprocess.Popen[str]", number: signal.Signals) -> tuple[str, str]:
    """Send the signal. Return the last message of the command and all its log. Fail if a process is left after 2 s."""
    workers = children_of(process.pid)
    begun = time.monotonic()
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # Ctrl-C reaches the whole process group
    else:
        process.send_signal(number)
    _, err = process.communicate(timeout=10)
    took = time.monotonic() - begun
    assert process.returncode == 130, err
    assert took < 2, "every process ends in 2 s"
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    (told,) = [line for line in err.splitlines() if line.startswith("interrupted: ")]
    return told, err


@pytest.mark.slow
def test_an_interrupted_job_is_resumed_with_the_printed_command(shoal: Shoal, tmp_path: Path, prompts: Path) -> None:
    output = tmp_path / "out put.jsonl"
    with started(command(prompts, output, "-tp", "2", "--overwrite"), start_new_session=True) as process:
        wait_for_lines(process, output, 10)
        assert len(children_of(process.pid)) >= 2
        told, _ = interrupt(process, signal.SIGINT)
    held = output.read_bytes()
    assert held.endswith(b"\n")
    lines = held.count(b"\n")
    assert f"holds {lines} of {COUNT} answers; go on with: shoal generate" in told
    arguments = shlex.split(told.partition("go on with: ")[2])[1:]
    assert "--overwrite" not in arguments
    assert shoal(*arguments, "--distributed-executor-backend", "threads") == 0
    assert output.read_bytes().startswith(held)
    assert_whole(output)


@pytest.mark.slow
def test_a_terminated_job_is_resumed(tmp_path: Path, prompts: Path) -> None:
    output = tmp_path / "out.jsonl"
    with started(command(prompts, output, "--resume")) as process:
        wait_for_lines(process, output, 10)
        told, _ = interrupt(process, signal.SIGTERM)
    lines = output.read_bytes().count(b"\n")
    assert 10 <= lines < COUNT
    assert f"holds {lines} of {COUNT} answers; go on with: shoal generate" in told
    assert told.endswith(" --ignore-eos --resume")


@pytest.mark.slow
def test_a_killed_job_is_resumed(
    shoal: Shoal, tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    with started(command(prompts, output)) as process:
        wait_for_lines(process, output, 10)
        process.kill()
    with output.open("ab") as file:
        file.write(b'{"index": 7, "promp')  # a line that it had not finished
    lines = output.read_bytes().count(b"\n")
    assert 10 <= lines < COUNT
    assert shoal(*command(prompts, output)) == 2
    assert f"--output {output} is not empty: add --resume" in capsys.readouterr().err
    assert shoal(*command(prompts, output, "--resume")) == 0
    assert_whole(output)
    capsys.readouterr()
    assert shoal(*command(prompts, output, "--resume")) == 0
    assert f"answers all {COUNT} prompts: nothing is left to do" in capsys.readouterr().err


@pytest.mark.slow
def test_a_disk_that_fills_up(shoal: Shoal, tmp_path: Path, prompts: Path) -> None:
    """A limit on the size of files acts as a full disk. Complete lines are kept."""
    output = tmp_path / "out.jsonl"
    limit = 8000
    arguments = command(prompts, output)
    with started(arguments, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    (told,) = [line for line in err.splitlines() if line.startswith("error: ")]
    held = output.read_bytes()
    assert limit - 500 < len(held) <= limit
    assert held.endswith(b"\n")
    count = held.count(b"\n")
    assert f"can't be written: File too large; {output} holds {count} of {COUNT} answers; go on with: shoal " in told
    assert shoal(*shlex.split(told.partition("go on with: ")[2])[1:]) == 0
    assert output.read_bytes().startswith(held)
    assert_whole(output)


def test_a_resume_file_of_other_prompts(
    shoal: Shoal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, output = tmp_path / "p.txt", tmp_path / "out.jsonl"
    prompts.write_text("1 + 1 =\n2 + 2 =\n")
    files = ["--prompts-file", prompts, "--output", output, *SMALL, "--max-tokens", 2]
    assert shoal("generate", *files, "--ordered") == 0
    before = output.read_bytes()

    def no_engine(*_: object, **__: object) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr("shoal.cli.generate.LLM", no_engine)
    for change, flags, says in [
        ("1 + 1 =\n2 + 3 =\n", [], "line 2 (index 1) answers another prompt than"),
        ("1 + 1 =\n", [], "has 1 more answers than there are prompts"),
        ("1 + 1 =\n2 + 2 =\n", ["--top-k", 3], "line 1 (index 0) was made with other sampling parameters"),
    ]:
        prompts.write_text(change)
        capsys.readouterr()
        assert shoal("generate", *files, "--resume", *flags) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line
        assert output.read_bytes() == before


@pytest.mark.slow
def test_stdin_is_read_only_once(
    shoal: Shoal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"

    def run(text: str, *flags: str) -> int:
        (tmp_path / "stdin").write_text(text)
        with (tmp_path / "stdin").open() as stdin, monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", stdin)
            files = ["--prompts-file", "-", "--output", output]
            return shoal("generate", *files, *SMALL, "--max-tokens", 2, *flags)

    assert run("1 + 1 =\n2 + 2 =\n") == 0
    assert run("1 + 1 =\n2 + 2 =\n3 + 3 =\n", "--resume") == 0
    assert [json.loads(line)["prompt"] for line in output.read_text().splitlines()][2:] == ["3 + 3 ="]
    capsys.readouterr()
    assert run("1 + 1 =\n2 + 3 =\n", "--resume") == 2
    assert "stdin, line 2" in capsys.readouterr().err
    assert output.read_bytes().count(b"\n") == 3


def test_an_engine_that_fails_during_a_job(
    shoal: Shoal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Failing:
        """An engine that fails after its first answer."""

        def __init__(self, opened: OpenModel) -> None:
            self.options = opened.options
            self.prepare = opened.reader().prepare

        def __enter__(self) -> "Failing":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def run(self, jobs: Iterable[Job], *, ordered: bool = False) -> Iterator[tuple[int, RequestOutput]]:
            first = next(iter(jobs))
            yield first.index, RequestOutput("", first.prompt, first.tokens, ())
            raise RankFailed("rank 1 died")

    prompts, output = tmp_path / "p.txt", tmp_path / "out.jsonl"
    prompts.write_text("1 + 1 =\n2 + 2 =\n")
    monkeypatch.setattr("shoal.cli.generate.LLM", Failing)
    assert shoal("generate", "--prompts-file", prompts, "--output", output, *SMALL) == 1
    told = capsys.readouterr().err
    assert f"error: rank 1 died; {output} holds 1 of 2 answers; go on with: shoal generate --prompts-file" in told


@pytest.mark.slow
def test_requests_and_answers_of_a_batch(shoal: Shoal, tmp_path: Path) -> None:
    prompts, output = tmp_path / "batch.jsonl", tmp_path / "out.jsonl"
    bodies: list[dict[str, Any]] = [
        {"prompt": "37 + 45 =", "max_tokens": 3, "temperature": 0, "logprobs": 1},
        {"prompt": "8 + 64 =", "max_tokens": -1},
        {"prompt": "8 + 64 =", "n": 2, "max_tokens": 3, "seed": 1},
    ]
    prompts.write_text(
        "".join(
            json.dumps({"custom_id": f"c{i}", "method": "POST", "url": "/v1/completions", "body": body}) + "\n"
            for i, body in enumerate(bodies)
        )
    )
    arguments = ["generate", "--prompts-file", prompts, "--output", output, "--ordered", *SMALL[:-1]]
    assert shoal(*arguments) == 1
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["custom_id"] for line in lines] == ["c0", "c1", "c2"]
    assert lines[0]["response"]["body"]["choices"][0]["text"] == " 82"
    assert "max_tokens must be at least 1" in lines[1]["error"]["message"]
    assert [choice["index"] for choice in lines[2]["response"]["body"]["choices"]] == [0, 1]
    assert shoal(*arguments, "--resume") == 1  # the same request fails again
    again = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["custom_id"] for line in again] == ["c0", "c2", "c1"]
    assert again[:2] == [lines[0], lines[2]]


# --- before the first line ---------------------------------------------------------------------------------------


class Stopped:
    """An engine that is interrupted while it starts."""

    def __init__(self, opened: OpenModel) -> None:
        raise KeyboardInterrupt


def test_an_interrupt_during_the_start_leaves_the_file_unchanged(
    shoal: Shoal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file has old answers, which `--resume` would keep."""
    output = tmp_path / "out.jsonl"
    output.write_text("old\n")
    monkeypatch.setattr("shoal.cli.generate.LLM", Stopped)
    same = ["generate", "-p", "1 + 1 =", "--output", str(output), "--overwrite"]
    assert shoal(*same) == 130
    told = capsys.readouterr().err.strip()
    assert told == f"interrupted: nothing was changed; start again with: {shlex.join(['shoal', *same])}"
    assert output.read_text() == "old\n"


@pytest.mark.parametrize(
    ("content", "flags", "left"),
    [("overwrite: true", ["--resume"], "kept"), ("resume: true", ["--overwrite"], "begun anew"),
     ("overwrite: true", [], "begun anew")],
)  # fmt: skip
def test_the_command_line_overrides_the_config_file(
    shoal: Shoal, tmp_path: Path, content: str, flags: list[str], left: str
) -> None:
    output, settings = tmp_path / "out.jsonl", tmp_path / "c.yaml"
    arguments = ["generate", "-p", "1 + 1 =", "--output", output, *SMALL, "--max-tokens", 2]
    assert shoal(*arguments) == 0
    marked = output.read_text().replace('"text": "', '"text": "KEPT')
    output.write_text(marked)
    settings.write_text(content)
    assert shoal(*arguments, "--config", settings, *flags) == 0
    assert ("KEPT" in output.read_text()) == (left == "kept")
    assert output.read_bytes().count(b"\n") == 1


def test_resume_and_overwrite_in_one_place_are_refused(
    shoal: Shoal, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tmp_path / "c.yaml"
    settings.write_text("overwrite: true\nresume: true\n")
    for flags in (["--config", settings], ["--resume", "--overwrite"]):
        assert shoal("generate", "-p", "a", "--output", tmp_path / "out", *flags) == 2
        assert "give --resume or --overwrite, not both" in capsys.readouterr().err


def test_a_file_that_another_run_has_filled_is_refused(
    shoal: Shoal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"

    def slowly(*arguments: Any, **keywords: Any) -> OpenModel:
        output.write_text("another's\n")
        return open_model(*arguments, **keywords)

    monkeypatch.setattr(generate_module, "open_model", slowly)
    monkeypatch.setattr(generate_module, "LLM", Stopped)
    assert shoal("generate", "-p", "a", "--output", output) == 2
    assert f"--output {output} is not empty" in capsys.readouterr().err
    assert output.read_text() == "another's\n"


def test_stdout_can_not_be_resumed(
    shoal: Shoal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-").write_text("a file of this name is none of our business")
    assert shoal("generate", "-p", "a", "--output", "-", "--resume") == 2
    assert "--resume needs an --output that can be read; - is not a regular file" in capsys.readouterr().err


@pytest.mark.slow
def test_a_hostile_grammar_fails_only_its_line(tmp_path: Path, shoal: Shoal) -> None:
    """One grammar would crash the process that compiles it, another never ends."""
    chain = "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(5000)) + 'r5000: "x"\n'
    endless = 'start: %json {"type": "integer", "multipleOf": 9999991}'
    hostile = [{"grammar": chain}, {"grammar": endless}, {"regex": "[a"}]
    lines = [{"prompt": "37 + 45 ="}, *({"prompt": "x", "sampling_params": {"structured_outputs": s}} for s in hostile)]
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert shoal("generate", "--prompts-file", prompts, "--output", output, "--max-tokens", 4) == 1
    found = {line["index"]: line for line in map(json.loads, output.read_text().splitlines())}
    assert found[0]["outputs"][0]["text"] == " 82"
    assert [found[i]["error"].split(":")[0] for i in (1, 2, 3)] == ["structured_outputs can't be used"] * 3
