"""Reading a JSON schema, given as text or as Python objects, into plain values without losing digits of numbers."""

import json
import math
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from shoal.errors import RequestError
from shoal.structured.schema.node import Schema, too_deep
from shoal.structured.schema.schema_error import schema_error

_MAX_LEVELS = 300  # lists and objects inside each other: more than people write, few enough for recursive functions
_MAX_CHARACTERS = 4 << 20
_MAX_VALUES = 200_000
_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)


def read_schema(given: Any) -> Schema:
    """Return the schema as plain dicts, lists and values.

    Raises:
        RequestError: the input is not JSON, not a schema, too large, or nested too deeply.
    """
    schema = _parsed(given) if isinstance(given, str) else _copied(given)
    if schema is False:
        raise schema_error("can't be obeyed: no text satisfies the schema false")
    if schema is not True and not isinstance(schema, dict):
        text = given if isinstance(given, str) else type(given).__name__
        raise schema_error(f"must be a JSON schema, which is an object, got {text[:40]}")
    return schema


def _parsed(text: str) -> Any:
    if len(text) > _MAX_CHARACTERS:
        raise schema_error(f"is too large: {len(text)} characters, but at most {_MAX_CHARACTERS} are allowed")
    level = deepest = 0
    for token in _TOKENS.finditer(text):
        level += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
        deepest = max(deepest, level)
    if deepest > _MAX_LEVELS:
        raise too_deep(deepest, _MAX_LEVELS)
    try:
        return json.loads(text, parse_float=Decimal, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _no_json(error) from error


def _copied(given: Any) -> Any:
    """Return a copy in which every mapping is a dict, every list or tuple a list, and every name a string."""
    whole: list[Any] = [None]
    pending: list[tuple[Any, Any, Any, int]] = [(given, whole, 0, 0)]
    count = deepest = 0
    while pending:
        value, into, key, level = pending.pop()
        count += 1
        deepest = max(deepest, level)
        if count > _MAX_VALUES:
            raise schema_error(f"is too large: it has more than {_MAX_VALUES} values")
        if isinstance(value, Mapping):
            into[key] = made = {_name(name): None for name in value}
            pending.extend((each, made, _name(name), level + 1) for name, each in value.items())
        elif isinstance(value, list | tuple):
            into[key] = items = [None] * len(value)
            pending.extend((each, items, i, level + 1) for i, each in enumerate(value))
        else:
            into[key] = _checked(value)
    if deepest > _MAX_LEVELS:
        raise too_deep(deepest, _MAX_LEVELS)
    return whole[0]


def _checked(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise _no_json(ValueError(f"{value} is not JSON"))
    if value is None or isinstance(value, bool | int | float | str | Decimal):
        return value
    raise _no_json(TypeError(f"a value of type {type(value).__name__} can't be written as JSON"))


def _name(key: Any) -> str:
    return key if isinstance(key, str) else json.dumps(key)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _no_json(error: Exception) -> RequestError:
    return schema_error(f"is not JSON: {' '.join(str(error).split())[:300]}")
