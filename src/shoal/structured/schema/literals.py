"""Rewriting `enum` and `const`, whose values may have numbers with any number of digits."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from shoal.errors import RequestError
from shoal.structured.schema import numbers
from shoal.structured.schema.bounds import read_bounds, read_multiple
from shoal.structured.schema.node import Location, Schema, any_of, has_type, identity, json_type, malformed, too_deep
from shoal.structured.schema.schema_error import schema_error

_MAX_LEVELS = 80  # lists and objects inside each other in one value
_NUMBERS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}


@dataclass(frozen=True, slots=True)
class Literals:
    """The values that `enum` and `const` of one schema allow."""

    values: list[Any]

    @classmethod
    def of(cls, keywords: dict[str, Any], here: Location) -> "Literals | None":
        """Return the values that both `enum` and `const` allow, or None if the schema has neither."""
        listed = keywords.get("enum")
        if "enum" in keywords and not isinstance(listed, list):
            raise malformed("enum", here, "be a list", listed)
        if "const" not in keywords:
            return None if listed is None else cls(listed)
        value = keywords["const"]
        return cls([value] if listed is None or identity(value) in map(identity, listed) else [])

    def to_schema(
        self,
        keywords: dict[str, Any],
        types: list[str] | tuple[str, ...],
        rewritten: dict[str, Any],
        here: Location,
    ) -> Schema:
        """Return a schema of those values that satisfy the other keywords too.

        Args:
            keywords: the keywords of the schema.
            types: the types that the schema allows.
            rewritten: the keywords of single types in rewritten form.

        Raises:
            RequestError: a number in the values is too large, or a value is nested too deeply.
        """
        _check_depth(self.values)
        fitting = [
            value for value in self.values if has_type(value, types) and _is_within_bounds(value, keywords, here)
        ]
        plain = [_json_value(value) for value in fitting if is_plain(value)]
        others = [value for value in fitting if not is_plain(value)]
        beside = {name: value for name, value in rewritten.items() if name not in _NUMBERS}
        if others and any(json_type(value) in ("array", "object") for value in others) and beside:
            raise schema_error(
                f"can't be obeyed: a number of more than 15 digits in enum or const at "
                f"{here.pointer} beside {', '.join(beside)}; remove those, the listed value needs no other keyword"
            )
        if any(json_type(value) in ("string", "array", "object") for value in plain) and beside:
            part: Schema = {"enum": plain, **beside}
        else:
            part = {"enum": plain} if plain else False
        return any_of([part, *(value_schema(value, here) for value in others)])


def _is_within_bounds(value: Any, keywords: dict[str, Any], here: Location) -> bool:
    """Return whether a value is not a number, or satisfies the bounds and `multipleOf` of the same schema."""
    number = numbers.to_decimal(value)
    if number is None or not _NUMBERS & keywords.keys():
        return True
    if not numbers.is_spellable(number):
        raise _too_long(here)
    multiple = read_multiple(keywords, here)
    fits = multiple is None or (Fraction(number) / Fraction(multiple)).denominator == 1
    return fits and read_bounds(keywords, here, integer=False).contains_number(number)


def _check_depth(value: Any) -> None:
    """Check that no value is nested more deeply than the library reads.

    Raises:
        RequestError: a value is nested too deeply.
    """
    level, deepest = [value], -1
    while level:
        deepest += 1
        level = [each for outer in level for each in _inner(outer)]
    if deepest > _MAX_LEVELS:
        raise too_deep(deepest, _MAX_LEVELS)


def _inner(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def is_plain(value: Any) -> bool:
    """Return whether all numbers in a JSON value are plain (see `numbers`), so that the library obeys it exactly."""
    pending = [value]
    while pending:
        each = pending.pop()
        if isinstance(each, list):
            pending.extend(each)
        elif isinstance(each, dict):
            pending.extend(each.values())
        elif (number := numbers.to_decimal(each)) is not None and not (
            numbers.is_spellable(number) and numbers.is_plain(number)
        ):
            return False
    return True


def enum_schema(values: Sequence[Any]) -> Schema:
    """Return a schema that allows exactly these values, which must be plain."""
    return {"enum": [_json_value(value) for value in values]} if values else False


def value_schema(value: Any, here: Location) -> Schema:
    """Return a schema that allows exactly this value."""
    if is_plain(value):
        return {"enum": [_json_value(value)]}
    if isinstance(value, list):
        items = [value_schema(each, here) for each in value]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    if isinstance(value, dict):
        properties = {key: value_schema(each, here) for key, each in value.items()}
        return {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }
    number = numbers.to_decimal(value)
    if number is None or not numbers.is_spellable(number):
        raise _too_long(here)
    return {numbers.TERMINAL: numbers.literal(number), numbers.PLACE: here.pointer}


def _json_value(value: Any) -> Any:
    """Return a plain value with each Decimal as an int or a float, so that it can be written as JSON."""
    if isinstance(value, list):
        return [_json_value(each) for each in value]
    if isinstance(value, dict):
        return {key: _json_value(each) for key, each in value.items()}
    number = numbers.to_decimal(value)
    return value if number is None else numbers.to_json_number(number)


def _too_long(here: Location) -> RequestError:
    return schema_error(f"can't be obeyed: a number in enum or const at {here.pointer} has hundreds of digits")
