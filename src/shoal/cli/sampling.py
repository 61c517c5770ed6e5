"""A command line flag for every sampling parameter, made from SamplingParams."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import click

from shoal.cli.numbers import AnyNumber, Integer
from shoal.errors import ConfigError, RequestError, UserError
from shoal.params import SamplingParams, StructuredOutputsParams
from shoal.values import whole_number

GROUP = "Sampling"
F = Callable[..., Any]
DEFAULTS = SamplingParams(temperature=0, max_tokens=64)  # of commands, where neither a flag nor the model says more

_FLAGS = {"seed": "sample-seed"}  # --seed is the engine's
_HELP = {
    "n": "outputs for each prompt",
    "temperature": "0 is greedy",
    "top_p": "draw from the likeliest tokens of this mass",
    "top_k": "draw from so many likeliest tokens; 0: all",
    "min_p": "drop tokens less likely than this share of the likeliest",
    "presence_penalty": "taken from the logit of each token that the output has, within [-2, 2]",
    "frequency_penalty": "... as often as it has it, within [-2, 2]",
    "repetition_penalty": "makes tokens of prompt and output less likely where above 1",
    "seed": "seed of the draws; the same seed gives the same text",
    "max_tokens": "tokens to generate at most",
    "min_tokens": "before so many, nothing ends the output",
    "ignore_eos": "go on after the end-of-text token",
    "stop": "a text that ends the output; may be given several times",
    "stop_token_ids": "tokens that end the output",
    "bad_words": "a text that must not be said; may be given several times",
    "logprobs": "report so many of the likeliest tokens beside the chosen one; -1: all",
    "prompt_logprobs": "... of each prompt token",
    "logit_bias": 'what is added to logits: {"50256": -100}',
    "allowed_token_ids": "draw no other tokens than these",
    "structured_outputs": 'what the output must look like: {"json": SCHEMA}, {"regex": ...} and so on',
    "detokenize": "make text of tokens",
    "skip_special_tokens": "leave special tokens out of the text",
    "include_stop_str_in_output": "leave the text that ended the output in it",
    "truncate_prompt_tokens": "cut a longer prompt to its last so many tokens; -1: to what the model takes",
}
_ORDER = ("max_tokens", "temperature", "top_p", "top_k")  # what people look for first
_SHORTHANDS = {
    "json_schema": ("FILE|JSON", "the output is JSON that obeys this schema"),
    "regex": ("REGEX", "the output matches this expression"),
    "choice": ("TEXT", "the output is this text, or another one given so"),
    "grammar": ("FILE|LARK", "the output obeys this grammar"),
}


class Json(click.ParamType):  # type: ignore[type-arg]
    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            self.fail(f"{value!r} is not JSON: {error}", param, ctx)


class TokenIds(click.ParamType):  # type: ignore[type-arg]
    name = "ids"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        numbers = tuple(whole_number(part.strip(" ")) for part in value.split(","))
        if None in numbers:
            self.fail(f"{value!r} is no list of token ids such as 1,2,3", param, ctx)
        return numbers


class _SamplingFlag(click.Option):
    group = GROUP


def sampling_flags(command: F) -> F:
    """Adds a flag for every parameter. The command gets what `sampling_values` reads."""
    for flag in reversed([*_parameter_flags(), *_shorthand_flags()]):
        click.decorators._param_memo(command, flag)
    return command


def _parameter_flags() -> list[click.Option]:
    hints = get_type_hints(SamplingParams)
    names = [f.name for f in dataclasses.fields(SamplingParams)]
    first = [name for name in _ORDER if name in names]
    return [_flag(name, hints[name]) for name in first + [name for name in names if name not in first]]


def _flag(name: str, hint: Any) -> click.Option:
    flag = _FLAGS.get(name, name.replace("_", "-"))
    default = getattr(DEFAULTS, name)
    shown = "" if default is None or default == () else f" [default: {default}]"
    names = [flag.replace("-", "_"), f"--{flag}"]
    kinds = [kind for kind in get_args(hint) if kind is not type(None)] or [hint]
    if kinds == [bool]:
        names[1] += f"/--no-{flag}"
        return _SamplingFlag(names, default=None, help=_HELP[name] + shown)
    metavar, kind, multiple = _form(kinds)
    return _SamplingFlag(names, type=kind, multiple=multiple, metavar=metavar, default=None, help=_HELP[name] + shown)


def _form(kinds: Sequence[Any]) -> tuple[str | None, Any, bool]:
    """(metavar, click's type, may it be given several times?)"""
    if kinds[0] in (int, float):
        return None, Integer() if kinds[0] is int else AnyNumber(), False
    if kinds[0] is StructuredOutputsParams or get_origin(kinds[0]) is Mapping:
        return "JSON", Json(), False
    if kinds[0] == Sequence[int]:
        return "1,2,...", TokenIds(), False
    return None, str, True


def _shorthand_flags() -> list[click.Option]:
    return [
        _SamplingFlag([name, f"--{name.replace('_', '-')}"], metavar=metavar, multiple=name == "choice", help=help)
        for name, (metavar, help) in _SHORTHANDS.items()
    ]


def sampling_values(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters among a command's keywords that were given, by the names of SamplingParams.

    Raises:
        UserError: a value is out of its range, a file can't be read, or several say what outputs must look like.
    """
    found = {}
    for f in dataclasses.fields(SamplingParams):
        value = flags.get(_FLAGS.get(f.name, f.name).replace("-", "_"))
        if value is not None and value != ():
            found[f.name] = value
    structured = {name: flags[name] for name in _SHORTHANDS if flags.get(name)}
    if len(structured) + ("structured_outputs" in found) > 1:
        given = [*structured, *(["structured_outputs"] if "structured_outputs" in found else [])]
        raise ConfigError(f"give one of {' and '.join('--' + name.replace('_', '-') for name in given)}")
    for name, value in structured.items():
        found["structured_outputs"] = (
            {"json": _schema(value)} if name == "json_schema" else {name: _content(name, value)}
        )
    # What goes together is found out with the model's defaults; what is wrong alone, here.
    SamplingParams.from_dict(found, SamplingParams(max_tokens=None))
    return found


def _schema(text: str) -> Any:
    content = _content("json_schema", text)
    try:
        schema = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--json-schema is neither a file nor JSON: {error}") from None
    if not isinstance(schema, dict):
        raise RequestError(f"--json-schema must be a JSON object, got {schema!r}")
    return schema


def _content(name: str, value: Any) -> Any:
    """The file's, where the value names one."""
    if name not in ("json_schema", "grammar"):
        return value
    try:
        path = Path(value)
        return path.read_text("utf-8") if path.is_file() else value
    except UnicodeDecodeError:
        raise UserError(f"--{name.replace('_', '-')} {value} can't be read: it is not UTF-8") from None
    except (OSError, ValueError):  # too long for a path, or has a NUL
        return value
