"""The basis of all modules that rewrite a JSON schema: locations of subschemas, reading and comparing their values.

A node is a JSON value where the schema has, or should have, a subschema. `here` is always the location of the node
that a function works on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Protocol

from shoal.errors import RequestError
from shoal.structured.schema.numbers import to_decimal
from shoal.structured.schema.references import References, Resource, Target, pointer_step
from shoal.structured.schema.schema_error import schema_error
from shoal.values import shown

Schema = dict[str, Any] | bool
STRICT = "x-shoal-strict"  # a keyword of our own: inside this subschema an unsupported keyword is an error
TYPES = ("null", "boolean", "number", "string", "array", "object")
_MAX_COUNT = (1 << 31) - 1  # items or characters: more than any output has


@dataclass(frozen=True, slots=True)
class Location:
    """The location of a subschema in the whole schema, and what follows from it for the subschema."""

    pointer: str  # a JSON pointer
    resource: Resource
    level: int = 0  # number of subschemas around it
    joined: bool = False  # a value must satisfy it, or a subschema around it, together with others (as in `allOf`)
    around: tuple[dict[str, Any], ...] = ()  # keywords of the schemas whose `allOf`, `then` or `else` contains it
    strict: bool = False  # an unsupported keyword is an error; else the keyword is dropped

    def under(self, *steps: str | int, joined: bool = False) -> "Location":
        """Return the location that these steps of a JSON pointer lead to from here."""
        pointer = "/".join([self.pointer, *(pointer_step(str(step)) for step in steps)])
        around = self.around if steps[0] in ("allOf", "then", "else") else ()
        return Location(pointer, self.resource, self.level + 1, self.joined or joined, around, self.strict)

    def at(self, target: Target) -> "Location":
        """Return the location of `target`, which a reference here leads to."""
        return Location(target.pointer, target.resource, joined=self.joined, strict=self.strict)


class SchemaRewriter(Protocol):
    """The `Rewriter` as the functions for single keywords use it; its methods are documented there."""

    references: References

    def keywords(self, node: dict[str, Any]) -> dict[str, Any]: ...
    def drop_keyword(self, keyword: str, here: Location, why: str = "") -> None: ...
    def rewrite_child(self, node: Any, here: Location, *steps: str | int, joined: bool = False) -> Schema: ...
    def follow(self, node: Any, here: Location) -> tuple[Any, Location]: ...
    def resolve_reference(self, keyword: str, reference: Any, here: Location) -> Target: ...
    def rewrite(self, node: Any, here: Location) -> Schema: ...


KeywordReader = Callable[[SchemaRewriter, dict[str, Any], Location], list[Schema]]


def malformed(name: str, here: Location, must: str, value: Any) -> RequestError:
    """Return an error that says what the keyword `name` must be (`must`: "be a list") and what it is."""
    return schema_error(f": {name} at {here.pointer} must {must}, got {shown(value)}")


def too_deep(levels: int, most: int) -> RequestError:
    return schema_error(f"is nested too deeply ({levels} levels, {most} are allowed)")


def read_types(keywords: dict[str, Any], here: Location) -> list[str] | None:
    """Return the types that the schema allows, or None if it names no type.

    Raises:
        RequestError: a type is unknown.
    """
    given = keywords.get("type")
    if "type" not in keywords:
        return None
    names = given if isinstance(given, list) else [given]
    for name in names:
        if not isinstance(name, str) or name not in (*TYPES, "integer"):
            raise malformed("type", here, f"be one of {', '.join(TYPES)}, integer", name)
    if not names:
        raise malformed("type", here, "name a type", given)
    found = list(dict.fromkeys([*names, *(["null"] if keywords.get("nullable") is True else [])]))
    return [name for name in found if name != "integer" or "number" not in found]


def read_count(keywords: dict[str, Any], name: str, here: Location, default: int | None = None) -> int | None:
    """Return the count (of items, characters, ...) that a keyword gives, or `default` if the keyword is missing.

    3.0 counts as 3. A count that no output can reach is replaced by a smaller one that no output can reach.

    Raises:
        RequestError: the value is not a count.
    """
    if name not in keywords:
        return default
    found = to_decimal(keywords[name])
    if found is None or found < 0 or found != found.to_integral_value():
        raise malformed(name, here, "be a whole number that is not negative", keywords[name])
    return int(min(found, Decimal(_MAX_COUNT)))


def read_object(keywords: dict[str, Any], name: str, here: Location) -> dict[str, Any]:
    found = keywords.get(name, {})
    if not isinstance(found, dict):
        raise malformed(name, here, "be an object", found)
    return found


def read_names(value: Any, name: str, here: Location) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise malformed(name, here, "be a list of texts", value)
    return list(dict.fromkeys(value))


def json_type(value: Any) -> str:
    """Return the JSON type of a value; a whole number is a "number"."""
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case str():
            return "string"
        case list():
            return "array"
        case dict():
            return "object"
    return "number"


def has_type(value: Any, types: list[str] | tuple[str, ...]) -> bool:
    """Return whether a value has one of these types of JSON Schema; 1.0 is an integer."""
    kind = json_type(value)
    if kind in types:
        return True
    return (
        kind == "number"
        and "integer" in types
        and to_decimal(value) == (to_decimal(value) or Decimal(0)).to_integral_value()
    )


def identity(value: Any) -> Any:
    """Return a hashable form that is the same for values that JSON Schema calls equal: 1 equals 1.0, but not true."""
    if isinstance(value, list):
        return ("array", tuple(map(identity, value)))
    if isinstance(value, dict):
        return ("object", frozenset((name, identity(each)) for name, each in value.items()))
    number = to_decimal(value)
    return (json_type(value), value) if number is None else ("number", number)


def distinct(values: Sequence[Any]) -> list[Any]:
    """Return the values without repetitions, in their order."""
    return list({identity(value): value for value in reversed(values)}.values())[::-1]


def all_of(parts: Sequence[Schema]) -> Schema:
    """Return one schema that is satisfied if all of these are."""
    flat: list[Schema] = []
    for part in parts:
        flat += part["allOf"] if isinstance(part, dict) and part.keys() == {"allOf"} else [part]
    if any(part is False for part in flat):
        return False
    left = [part for part in flat if part is not True]
    return True if not left else left[0] if len(left) == 1 else {"allOf": left}


def any_of(parts: Sequence[Schema]) -> Schema:
    """Return one schema that is satisfied if at least one of these is."""
    if any(part is True for part in parts):
        return True
    left = [part for part in parts if part is not False]
    return False if not left else left[0] if len(left) == 1 else {"anyOf": left}
