"""Every sampling parameter as a flag."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from shoal.cli.sampling import DEFAULTS, sampling_flags, sampling_values
from shoal.config.engine_options import options
from shoal.params import SAMPLING_TABLE, SamplingParams, StructuredOutputsParams

Shoal = Callable[..., int]
SCHEMA = {"type": "object"}


@click.command()
@sampling_flags
def command(**flags: Any) -> dict[str, Any]:
    return sampling_values(flags)


def params(*arguments: str) -> SamplingParams:
    return SamplingParams.from_dict(command.main(list(arguments), standalone_mode=False), DEFAULTS)


@pytest.mark.parametrize(
    ("arguments", "changes"),
    [
        ([], {}),
        (["--n", "3", "--temperature", "0.5"], {"n": 3, "temperature": 0.5}),
        (["--temperature", "1", "--top-p", "0.5", "--top-k", "4", "--min-p", "0.1"],
         {"temperature": 1, "top_p": 0.5, "top_k": 4, "min_p": 0.1}),
        (["--presence-penalty", "-1", "--frequency-penalty", "0.5", "--repetition-penalty", "1.2"],
         {"presence_penalty": -1, "frequency_penalty": 0.5, "repetition_penalty": 1.2}),
        (["--sample-seed", "0"], {"seed": 0}),
        (["--max-tokens", "5", "--min-tokens", "2", "--ignore-eos"],
         {"max_tokens": 5, "min_tokens": 2, "ignore_eos": True}),
        (["--stop", "a", "--stop", "b, c"], {"stop": ["a", "b, c"]}),
        (["--stop-token-ids", "1,2", "--allowed-token-ids", "3"], {"stop_token_ids": [1, 2], "allowed_token_ids": [3]}),
        (["--bad-words", "x"], {"bad_words": ["x"]}),
        (["--logprobs", "0", "--prompt-logprobs", "-1"], {"logprobs": 0, "prompt_logprobs": -1}),
        (["--logit-bias", '{"5": -100, "6": 1.5}'], {"logit_bias": {5: -100.0, 6: 1.5}}),
        (["--no-detokenize"], {"detokenize": False}),
        (["--no-skip-special-tokens"], {"skip_special_tokens": False}),
        (["--no-spaces-between-special-tokens"], {"spaces_between_special_tokens": False}),
        (["--truncate-prompt-tokens", "-1"], {"truncate_prompt_tokens": -1}),
        (["--include-stop-str-in-output"], {"include_stop_str_in_output": True}),
        (["--structured-outputs", '{"regex": "a+"}'], {"structured_outputs": StructuredOutputsParams(regex="a+")}),
        (["--json-schema", json.dumps(SCHEMA)], {"structured_outputs": StructuredOutputsParams(json=SCHEMA)}),
        (["--regex", "a+"], {"structured_outputs": StructuredOutputsParams(regex="a+")}),
        (["--choice", "a", "--choice", "b"], {"structured_outputs": StructuredOutputsParams(choice=["a", "b"])}),
        (["--grammar", "start: A"], {"structured_outputs": StructuredOutputsParams(grammar="start: A")}),
    ],
)  # fmt: skip
def test_flags_become_parameters(arguments: list[str], changes: dict[str, Any]) -> None:
    assert params(*arguments) == dataclasses.replace(DEFAULTS, **changes)


def test_schemas_and_grammars_from_files(tmp_path: Path) -> None:
    (tmp_path / "schema").write_text(json.dumps(SCHEMA))
    (tmp_path / "grammar").write_text("start: A")
    assert params("--json-schema", str(tmp_path / "schema")).structured_outputs == StructuredOutputsParams(json=SCHEMA)
    assert params("--grammar", str(tmp_path / "grammar")).structured_outputs == StructuredOutputsParams(
        grammar="start: A"
    )


def test_every_parameter_has_a_flag() -> None:
    names = {parameter.name for parameter in command.params}
    rows = [row for row in SAMPLING_TABLE.values() if row.flag is not None]
    assert {row.name for row in SAMPLING_TABLE.values() if row.flag is None} == {
        *("extra_args", "logits_processors", "thinking_token_budget")
    }
    assert {"sample_seed" if row.name == "seed" else row.name for row in rows} <= names
    helps = {parameter.name: str(parameter.help) for parameter in command.params if isinstance(parameter, click.Option)}
    for row in rows:
        assert row.help in helps["sample_seed" if row.name == "seed" else row.name]
    assert not names & {option.name for option in options()}
    for parameter in command.params:
        assert isinstance(parameter, click.Option)
        assert len(parameter.help or "") > 8


@pytest.mark.parametrize(
    ("flag", "value", "says"),
    [
        ("--n", "0", "n must be an integer in [1, 16384]"),
        ("--min-p", "2", "min_p must be in [0, 1]"),
        ("--presence-penalty", "3", "presence_penalty must be in [-2, 2]"),
        ("--repetition-penalty", "0", "repetition_penalty must be above 0"),
        ("--min-tokens", "-1", "min_tokens must be at least 0"),
        ("--stop", "", "stop must be a list of texts that are not empty"),
        ("--stop-token-ids", "1,x", "'1,x' is not a list of token ids"),
        ("--stop-token-ids", "-1", "stop_token_ids must be a list of token ids"),
        ("--logit-bias", "{", "is not JSON"),
        ("--logit-bias", "5", "logit_bias must map token ids"),
        ("--logit-bias", '{"5": 101}', "logit_bias of token 5 must be in [-100, 100]"),
        ("--logprobs", "-2", "logprobs must be at least 0"),
        ("--structured-outputs", '{"regexp": "a"}', "unknown kind of structured_outputs 'regexp'; did you mean regex?"),
        ("--structured-outputs", "{}", "structured_outputs takes exactly one of"),
        ("--structured-outputs", "5", "structured_outputs must be"),
        ("--json-schema", "nowhere.json", "--json-schema is neither a file nor JSON"),
        ("--json-schema", "5", "--json-schema must be a JSON object"),
    ],
)
def test_invalid_values(shoal: Shoal, capsys: pytest.CaptureFixture[str], flag: str, value: str, says: str) -> None:
    assert shoal("generate", f"{flag}={value}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert says.removeprefix("n must be an integer") in line


def test_only_one_form_of_structured_output(shoal: Shoal, capsys: pytest.CaptureFixture[str]) -> None:
    assert shoal("generate", "--regex", "a", "--choice", "b") == 2
    assert "give one of --regex and --choice" in capsys.readouterr().err
    assert shoal("generate", "--regex", "a", "--structured-outputs", '{"choice": ["b"]}') == 2
    assert "give one of --regex and --structured-outputs" in capsys.readouterr().err
