"""The command line flags of sampling parameters, made from the table of sampling parameters."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from shoal.cli.numbers import AnyNumber, Integer
from shoal.errors import ConfigError, RequestError, UserError
from shoal.parameter_forms import Number, Switch, Texts, TokenIds
from shoal.params import SAMPLING_TABLE, SamplingParams
from shoal.sampling_table import SamplingParameter
from shoal.values import whole_number

GROUP = "Sampling"
F = Callable[..., Any]
DEFAULTS = SamplingParams(temperature=0, max_tokens=64)  # of commands, where neither a flag nor the model says more

_FIRST = ("max_tokens", "temperature", "top_p", "top_k")  # the flags that people look for first
_SHORTHANDS = {
    "json_schema": ("FILE|JSON", "the output is JSON that obeys this schema"),
    "regex": ("REGEX", "the output matches this expression"),
    "choice": ("TEXT", "the output is this text; if given several times, one of these texts"),
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


class IdList(click.ParamType):  # type: ignore[type-arg]
    name = "ids"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        numbers = tuple(whole_number(part.strip(" ")) for part in value.split(","))
        if None in numbers:
            self.fail(f"{value!r} is not a list of token ids such as 1,2,3", param, ctx)
        return numbers


class _SamplingFlag(click.Option):
    group = GROUP


def sampling_flags(command: F) -> F:
    """Add a flag for each sampling parameter to a command. `sampling_values` reads them."""
    for flag in reversed([*_parameter_flags(), *_shorthand_flags()]):
        click.decorators._param_memo(command, flag)
    return command


def _parameter_flags() -> list[click.Option]:
    first = [SAMPLING_TABLE[name] for name in _FIRST]
    rows = first + [row for row in SAMPLING_TABLE.values() if row not in first]
    return [_option(row, row.flag) for row in rows if row.flag is not None]


def _option(row: SamplingParameter, flag: str) -> click.Option:
    names = [_keyword(flag), f"--{flag}"]
    default = getattr(DEFAULTS, row.name)
    shown = "" if default is None or default == () else f" [default: {default}]"
    if isinstance(row.form, Switch):
        names[1] += f"/--no-{flag}"
        return _SamplingFlag(names, default=None, help=row.help + shown)
    metavar, kind, multiple = _click_type(row)
    text = f"{row.help}; may be given several times" if multiple else row.description
    return _SamplingFlag(names, type=kind, multiple=multiple, metavar=metavar, default=None, help=text + shown)


def _click_type(row: SamplingParameter) -> tuple[str | None, Any, bool]:
    """Return the placeholder of a flag in the help, its click type, and whether it may be given several times."""
    match row.form:
        case Number():
            return None, Integer() if row.form.integer else AnyNumber(), False
        case TokenIds():
            return "1,2,...", IdList(), False
        case Texts():
            return None, str, True
    return "JSON", Json(), False


def _keyword(flag: str) -> str:
    """Return the name that click has for a flag."""
    return flag.replace("-", "_")


def _shorthand_flags() -> list[click.Option]:
    return [
        _SamplingFlag([name, f"--{name.replace('_', '-')}"], metavar=metavar, multiple=name == "choice", help=help)
        for name, (metavar, help) in _SHORTHANDS.items()
    ]


def sampling_values(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sampling parameters that were given to a command, by the names of `SamplingParams`.

    Args:
        flags: the keyword arguments of the command.

    Raises:
        UserError: a value is out of its range, a file can't be read, or several flags say what the output must look
            like.
    """
    found = {}
    for row in SAMPLING_TABLE.values():
        value = None if row.flag is None else flags.get(_keyword(row.flag))
        if value is not None and value != ():
            found[row.name] = value
    structured = {name: flags[name] for name in _SHORTHANDS if flags.get(name)}
    if len(structured) + ("structured_outputs" in found) > 1:
        given = [*structured, *(["structured_outputs"] if "structured_outputs" in found else [])]
        raise ConfigError(f"give one of {' and '.join('--' + name.replace('_', '-') for name in given)}")
    for name, value in structured.items():
        found["structured_outputs"] = (
            {"json": _schema(value)} if name == "json_schema" else {name: _content(name, value)}
        )
    # Each value is checked by itself here; how the values go together is checked when the model's defaults are known.
    SamplingParams.from_dict(found, SamplingParams(max_tokens=None))
    return found


def _schema(text: str) -> Any:
    content = _content("json_schema", text)
    try:
        schema = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--json-schema is neither a file nor JSON: {error}") from None
    if not isinstance(schema, dict):
        raise RequestError(f"--json-schema must be a JSON object, got {schema!r}", "structured_outputs")
    return schema


def _content(name: str, value: Any) -> Any:
    """Return the content of a file if the value is the name of one, else the value."""
    if name not in ("json_schema", "grammar"):
        return value
    try:
        path = Path(value)
        return path.read_text("utf-8") if path.is_file() else value
    except UnicodeDecodeError:
        raise UserError(f"--{name.replace('_', '-')} {value} can't be read: it is not UTF-8") from None
    except (OSError, ValueError):  # the value is too long for a path, or has a NUL character
        return value
