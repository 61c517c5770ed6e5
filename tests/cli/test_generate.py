"""`shoal generate` without mistakes or failures."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Shoal = Callable[..., int]
QUIET = ["--kv-cache-memory-bytes", "16MiB"]


def test_texts_are_printed_in_the_order_of_prompts(shoal: Shoal, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["Count from 3 to 9:", "8 + 64 =", "Reverse: apple ->"]  # the first takes the most steps
    arguments = [part for prompt in prompts for part in ("-p", prompt)]
    assert shoal("generate", *arguments, *QUIET) == 0
    assert capsys.readouterr().out.splitlines() == [
        "Count from 3 to 9: 3 4 5 6 7 8 9",
        "8 + 64 = 72",
        "Reverse: apple -> elppa",
    ]


@pytest.mark.parametrize("model", [None, "bundled", "bundled:dense", "bundled:moe"])
def test_the_bundled_models_have_built_in_prompts(
    shoal: Shoal, capsys: pytest.CaptureFixture[str], model: str | None
) -> None:
    assert shoal("generate", *([] if model is None else [model]), *QUIET) == 0
    assert capsys.readouterr().out.splitlines() == [
        "37 + 45 = 82",
        "Count from 3 to 9: 3 4 5 6 7 8 9",
        "Reverse: apple -> elppa",
        "Sort: pear apple fig -> apple fig pear",
        "8 + 64 = 72",
    ]


def test_prompts_and_answers_in_files(shoal: Shoal, tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "8 + 64 ="}\n\n{"prompt_token_ids": [5, 6, 7]}\n', "utf-8")
    limits = ["--max-tokens", "4", "--temperature", "0.7", "--top-p", "0.9", "--top-k", "5", "--sample-seed", "1"]
    files = ["--prompts-file", str(prompts), "--output", str(output)]
    assert shoal("generate", *files, *limits, "--ignore-eos", *QUIET) == 0
    lines = sorted(
        (json.loads(line) for line in output.read_text("utf-8").splitlines()), key=lambda line: line["index"]
    )
    assert [line["prompt"] for line in lines] == ["8 + 64 =", None]
    assert lines[1]["prompt_token_ids"] == [5, 6, 7]
    for line in lines:
        assert set(line) == {"index", "prompt", "prompt_token_ids", "outputs", "digest"}
        (completion,) = line["outputs"]
        assert set(completion) == {"text", "token_ids", "finish_reason", "stop_reason"}
        assert (len(completion["token_ids"]), completion["finish_reason"]) == (4, "length")


def test_a_sample_seed_gives_the_same_text(shoal: Shoal, capsys: pytest.CaptureFixture[str]) -> None:
    def text(seed: str) -> str:
        sampling = ["--temperature", "2", "--sample-seed", seed, "--ignore-eos", "--max-tokens", "20"]
        assert shoal("generate", "-p", "The cat", *sampling, *QUIET) == 0
        return capsys.readouterr().out

    assert text("1") == text("1") != text("2")


def test_a_failed_prompt_does_not_stop_others(shoal: Shoal, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "8 + 64 ="}\n{"prompt": ""}\n{"prompt": "Reverse: apple ->"}\n', "utf-8")
    assert shoal("generate", "--prompts-file", str(prompts), *QUIET) == 1
    printed = capsys.readouterr()
    assert printed.out.splitlines() == ["8 + 64 = 72", "Reverse: apple -> elppa"]
    assert f"error: prompt 1 ({prompts}, line 2): the prompt is empty" in printed.err


@pytest.mark.slow
def test_a_chat_prints_only_answers(shoal: Shoal, capsys: pytest.CaptureFixture[str]) -> None:
    assert shoal("generate", "--chat", "-p", "Count from 3 to 9:", "-p", "37 + 45 =", *QUIET) == 0
    assert capsys.readouterr().out.splitlines() == ["3 4 5 6 7 8 9", "37 + 45 = 82."]


def test_every_output_of_a_prompt_is_printed(shoal: Shoal, capsys: pytest.CaptureFixture[str]) -> None:
    sampling = ["--n", "3", "--temperature", "0.01", "--sample-seed", "1"]
    assert shoal("generate", "-p", "37 + 45 =", *sampling, *QUIET) == 0
    assert capsys.readouterr().out.splitlines() == ["37 + 45 = 82"] * 3


def test_tokens_are_printed_without_a_tokenizer(
    shoal: Shoal, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt_token_ids": [5, 6]}\n')
    assert shoal("generate", "--prompts-file", tmp_path / "p.jsonl", "--max-tokens", "2", "--ignore-eos", *QUIET) == 0
    printed = capsys.readouterr().out.split()
    assert printed[:2] == ["2", "tokens"]
    assert len(printed) == 4


SCHEMA = '{"type": "object", "properties": {"a": {"type": "string", "minLength": 1000}}, "required": ["a"]}'


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "cut", "way_out"),
    [
        (["--json-schema", SCHEMA, "--max-tokens", "8"], 8, "--max-tokens"),
        (["--regex", "[a-z]{50}", "--max-tokens", "3"], 3, "--max-tokens"),
        (["--regex", "[a-z]{100}", "--max-tokens", "200", "--max-model-len", "32"], None, "--max-model-len"),
        (["--regex", "[0-9]{2}"], None, None),
        (["--ignore-eos", "--max-tokens", "3"], None, None),
    ],
    ids=["json", "regex", "model", "complete", "plain"],
)
def test_a_structured_output_that_was_cut_is_reported(
    shoal: Shoal, capsys: pytest.CaptureFixture[str], flags: list[str], cut: int | None, way_out: str | None
) -> None:
    assert shoal("generate", "-p", "A user:", *flags, *QUIET) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    if way_out is None:
        assert warnings == []
        return
    (warning,) = warnings
    assert warning.startswith(f"warning: prompt 0: the output was cut at {cut or ''}")
    assert warning.endswith(f"tokens and may be incomplete; raise {way_out}")


@pytest.mark.slow
def test_a_warning_names_the_line_of_a_file(shoal: Shoal, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    own = {"max_tokens": 2, "structured_outputs": {"regex": "[0-9]{5}"}}
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "A", "sampling_params": own}))
    assert shoal("generate", "--prompts-file", tmp_path / "p.jsonl", *QUIET) == 0
    assert (
        f"warning: prompt 0 ({tmp_path / 'p.jsonl'}, line 1): the output was cut at 2 tokens and may be incomplete; "
        "raise --max-tokens or the prompt's own max_tokens\n"
    ) in capsys.readouterr().err
