"""The file of `--config`: YAML whose keys are flags. It is as strict as the command line: no mistake is ignored."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click

from shoal.config import vllm_options
from shoal.errors import ConfigError
from shoal.lazy import load
from shoal.values import closest

# YAML 1.1 reads numbers without a point, or without a sign after the e, such as 1e-3, as texts; YAML 1.2 does not.
_SCIENTIFIC = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+\Z")


class _Twice(Exception):
    """A mapping has a key twice; its text is `line 3: seed`."""


def read_config_file(path: str, parameters: Sequence[click.Parameter]) -> dict[str, Any]:
    """Return parameter name -> value. Keys are flags without the dashes in front, with - or _ between words. A flag
    that may be given several times takes a list.

    Raises:
        ConfigError: the file can't be read, or a key is unknown, is given twice or has a value of the wrong type.
    """
    keys = _keys(parameters)
    found: dict[str, Any] = {}
    for key, value in _read(path).items():
        name = str(key).replace("_", "-").lstrip("-")
        if name not in keys:
            near = closest(name, keys)
            hint = f"did you mean {near}?" if near else "docs/flags.md lists the known ones"
            raise ConfigError(f"--config {path}: unknown key {key}; {vllm_options.explain(name) or hint}")
        parameter, negated = keys[name]
        checked = _check(parameter, f"--config {path}: {key}", value)
        if parameter.name in found:
            raise ConfigError(f"--config {path}: {key} is given twice")
        if checked is not None and parameter.name is not None:
            found[parameter.name] = not checked if negated else checked
    return found


def _read(path: str) -> Mapping[Any, Any]:
    yaml_error: type[Exception] = load("yaml:YAMLError")
    try:
        with open(path, encoding="utf-8") as file:
            values = load("yaml:load")(file, _loader())
    except _Twice as error:
        raise ConfigError(f"--config {path}, {error} is given twice") from None
    except OSError as error:
        raise ConfigError(f"--config {path} can't be read: {error.strerror}") from None
    except (yaml_error, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ConfigError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise ConfigError(f"--config {path} must map flags to values, such as `max-tokens: 64`")
    return values


def _loader() -> Any:
    """Return PyYAML's safe loader, which here refuses keys that are given twice and reads numbers as YAML 1.2 does."""
    loader: Any = type("_Loader", (load("yaml:SafeLoader"),), {})
    loader.add_constructor("tag:yaml.org,2002:map", _mapping)
    loader.add_implicit_resolver("tag:yaml.org,2002:float", _SCIENTIFIC, list("-+.0123456789"))
    return loader


def _mapping(loader: Any, node: Any) -> Iterator[Any]:
    """Construct a mapping whose keys differ.

    Raises:
        _Twice: a key comes again. (Keys that `<<` merges in may: those of the mapping itself override them.)
    """
    seen = set()
    for key, _ in node.value:
        if isinstance(key.value, str):  # PyYAML refuses lists and mappings as keys
            if (key.tag, key.value) in seen:
                raise _Twice(f"line {key.start_mark.line + 1}: {key.value}")
            seen.add((key.tag, key.value))
    yield from loader.construct_yaml_map(node)


def _keys(parameters: Sequence[click.Parameter]) -> dict[str, tuple[click.Parameter, bool]]:
    """Return key -> (parameter, whether the key switches it off)."""
    found: dict[str, tuple[click.Parameter, bool]] = {}
    for parameter in parameters:
        if isinstance(parameter, click.Argument) and parameter.name:
            found[parameter.name.replace("_", "-")] = (parameter, False)
        elif isinstance(parameter, click.Option) and parameter.expose_value and not parameter.hidden:
            for name in parameter.opts:
                found[name.lstrip("-")] = (parameter, False)
            for name in parameter.secondary_opts:
                found[name.lstrip("-")] = (parameter, True)
    return found


def _check(parameter: click.Parameter, name: str, value: Any) -> Any:
    """Return the value as click has it from the command line; None means not given."""
    option = getattr(parameter, "option", None)
    if option is not None:
        return option.check(value, name)
    if value is None:
        return None
    if parameter.multiple:
        values = value if isinstance(value, list) else [value]
        return tuple(_scalar(parameter, name, each) for each in values)
    return _scalar(parameter, name, value)


def _scalar(parameter: click.Parameter, name: str, value: Any) -> Any:
    kind = parameter.type
    for click_type, types, what in _TYPES:
        if isinstance(kind, click_type):
            if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
                raise ConfigError(f"{name} takes {what}, got {value!r}")
            break
    try:
        return parameter.type.convert(value, parameter, None)
    except click.BadParameter as error:
        raise ConfigError(f"{name}: {error.message.rstrip('.')}") from None


_TYPES: tuple[tuple[type[Any], tuple[type, ...], str], ...] = (
    (click.types.BoolParamType, (bool,), "true or false"),
    (click.types.IntParamType, (int,), "an integer"),
    (click.types.FloatParamType, (int, float), "a number"),
    (click.types.StringParamType, (str,), "a text"),
    (click.Choice, (str,), "a text"),
    (click.Path, (str,), "a text"),
)
