"""`enum` and `const`: the values that are meant, with numbers of any size."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from shoal.errors import RequestError
from shoal.structured.schema import numbers
from shoal.structured.schema.bounds import bounds_of, multiple_of
from shoal.structured.schema.node import Here, Schema, any_of, has_type, identity, kind_of, malformed, too_deep

_MOST_LEVELS = 80  # of lists and objects in a value
_NUMBERS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}


@dataclass(frozen=True, slots=True)
class Literals:
    values: list[Any]

    @classmethod
    def of(cls, words: dict[str, Any], here: Here) -> "Literals | None":
        """The values that `enum` and `const` leave, None where there is neither."""
        listed = words.get("enum")
        if "enum" in words and not isinstance(listed, list):
            raise malformed("enum", here, "be a list", listed)
        if "const" not in words:
            return None if listed is None else cls(listed)
        value = words["const"]
        return cls([value] if listed is None or identity(value) in map(identity, listed) else [])

    def schema(
        self,
        words: dict[str, Any],
        types: list[str] | tuple[str, ...],
        keywords: dict[str, Any],
        here: Here,
    ) -> Schema:
        """
        Args:
            keywords: the rewritten ones of the types that stand beside them.

        Raises:
            RequestError: a number in them is too large.
        """
        _check_depth(self.values)
        fitting = [value for value in self.values if has_type(value, types) and _within(value, words, here)]
        plain = [_emitted(value) for value in fitting if is_plain(value)]
        others = [value for value in fitting if not is_plain(value)]
        beside = {name: value for name, value in keywords.items() if name not in _NUMBERS}
        if others and any(kind_of(value) in ("array", "object") for value in others) and beside:
            raise RequestError(
                f"structured_outputs.json can't be obeyed: a number of more than 15 digits in enum or const at "
                f"{here.place} beside {', '.join(beside)}; leave those out, for the value says it all"
            )
        if any(kind_of(value) in ("string", "array", "object") for value in plain) and beside:
            part: Schema = {"enum": plain, **beside}
        else:
            part = {"enum": plain} if plain else False
        return any_of([part, *(literal(value, here) for value in others)])


def _within(value: Any, words: dict[str, Any], here: Here) -> bool:
    """Whether a number lies within the bounds beside it."""
    number = numbers.exact(value)
    if number is None or not _NUMBERS & words.keys():
        return True
    if not numbers.in_reach(number):
        raise _too_long(here)
    multiple = multiple_of(words, here)
    fits = multiple is None or (Fraction(number) / Fraction(multiple)).denominator == 1
    return fits and bounds_of(words, here, integer=False).holds(number)


def _check_depth(value: Any) -> None:
    """
    Raises:
        RequestError: a value is nested deeper than the library reads.
    """
    level, deepest = [value], -1
    while level:
        deepest += 1
        level = [each for outer in level for each in _inner(outer)]
    if deepest > _MOST_LEVELS:
        raise too_deep(deepest, _MOST_LEVELS)


def _inner(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def is_plain(value: Any) -> bool:
    """The library obeys it exactly."""
    pending = [value]
    while pending:
        each = pending.pop()
        if isinstance(each, list):
            pending.extend(each)
        elif isinstance(each, dict):
            pending.extend(each.values())
        elif (number := numbers.exact(each)) is not None and not (
            numbers.in_reach(number) and numbers.is_plain(number)
        ):
            return False
    return True


def listed_schema(values: Sequence[Any]) -> Schema:
    """A schema of these values, which are plain."""
    return {"enum": [_emitted(value) for value in values]} if values else False


def literal(value: Any, here: Here) -> Schema:
    """A schema of one value."""
    if is_plain(value):
        return {"enum": [_emitted(value)]}
    if isinstance(value, list):
        items = [literal(each, here) for each in value]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    if isinstance(value, dict):
        properties = {key: literal(each, here) for key, each in value.items()}
        return {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }
    number = numbers.exact(value)
    if number is None or not numbers.in_reach(number):
        raise _too_long(here)
    return {numbers.TERMINAL: numbers.literal(number), numbers.PLACE: here.place}


def _emitted(value: Any) -> Any:
    """A plain value as it goes into JSON."""
    if isinstance(value, list):
        return [_emitted(each) for each in value]
    if isinstance(value, dict):
        return {key: _emitted(each) for key, each in value.items()}
    number = numbers.exact(value)
    return value if number is None else numbers.written(number)


def _too_long(here: Here) -> RequestError:
    return RequestError(
        f"structured_outputs.json can't be obeyed: a number in enum or const at {here.place} has hundreds of digits"
    )
