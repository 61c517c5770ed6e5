"""What the modules that rewrite schemas share: a place in a schema, and how its values are read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Protocol

from shoal.errors import RequestError
from shoal.structured.schema.numbers import exact
from shoal.structured.schema.references import References, Resource, Target, pointer_step
from shoal.values import shown

Schema = dict[str, Any] | bool
STRICT = "x-shoal-strict"  # a keyword of our own: in this subschema, what can't be obeyed is an error
TYPES = ("null", "boolean", "number", "string", "array", "object")
_MOST_COUNT = (1 << 31) - 1  # more items or characters than any output has


@dataclass(frozen=True, slots=True)
class Here:
    """Where a subschema is."""

    place: str  # a JSON pointer
    resource: Resource
    level: int = 0  # subschemas around it
    joined: bool = False  # it, or one around it, holds together with others
    around: tuple[dict[str, Any], ...] = ()  # the schemas whose `allOf`, `then` or `else` it is in
    strict: bool = False

    def under(self, *steps: str | int, joined: bool = False) -> "Here":
        place = "/".join([self.place, *(pointer_step(str(step)) for step in steps)])
        around = self.around if steps[0] in ("allOf", "then", "else") else ()
        return Here(place, self.resource, self.level + 1, self.joined or joined, around, self.strict)

    def at(self, target: Target) -> "Here":
        """The place that a reference from here leads to."""
        return Here(target.place, target.resource, joined=self.joined, strict=self.strict)


class Rewrites(Protocol):
    """What rewrites a schema, as its parts see it."""

    references: References

    def words(self, node: dict[str, Any]) -> dict[str, Any]: ...
    def skip(self, keyword: str, here: Here, why: str = "") -> None: ...
    def child(self, node: Any, here: Here, *steps: str | int, joined: bool = False) -> Schema: ...
    def followed(self, node: Any, here: Here) -> tuple[Any, Here]: ...
    def target(self, keyword: str, reference: Any, here: Here) -> Target: ...
    def schema(self, node: Any, here: Here) -> Schema: ...


Read = Callable[[Rewrites, dict[str, Any], Here], list[Schema]]


def malformed(name: str, here: Here, must: str, value: Any) -> RequestError:
    return RequestError(f"structured_outputs.json: {name} at {here.place} must {must}, got {shown(value)}")


def too_deep(levels: int, most: int) -> RequestError:
    return RequestError(f"structured_outputs.json is nested too deeply ({levels} levels, {most} are allowed)")


def types_of(words: dict[str, Any], here: Here) -> list[str] | None:
    """The types that are allowed; None where none is named.

    Raises:
        RequestError: one is unknown.
    """
    given = words.get("type")
    if "type" not in words:
        return None
    names = given if isinstance(given, list) else [given]
    for name in names:
        if not isinstance(name, str) or name not in (*TYPES, "integer"):
            raise malformed("type", here, f"be one of {', '.join(TYPES)}, integer", name)
    if not names:
        raise malformed("type", here, "name a type", given)
    found = list(dict.fromkeys([*names, *(["null"] if words.get("nullable") is True else [])]))
    return [name for name in found if name != "integer" or "number" not in found]


def integer_of(words: dict[str, Any], name: str, here: Here, default: int | None = None) -> int | None:
    """A count, 3.0 being as good as 3; what no output reaches is cut to what none reaches either.

    Raises:
        RequestError: it is none.
    """
    if name not in words:
        return default
    found = exact(words[name])
    if found is None or found < 0 or found != found.to_integral_value():
        raise malformed(name, here, "be a whole number that is not negative", words[name])
    return int(min(found, Decimal(_MOST_COUNT)))


def mapping_of(words: dict[str, Any], name: str, here: Here) -> dict[str, Any]:
    found = words.get(name, {})
    if not isinstance(found, dict):
        raise malformed(name, here, "be an object", found)
    return found


def names_of(value: Any, name: str, here: Here) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise malformed(name, here, "be a list of texts", value)
    return list(dict.fromkeys(value))


def kind_of(value: Any) -> str:
    """The type of a value of JSON; a whole number is a number."""
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
    kind = kind_of(value)
    if kind in types:
        return True
    return kind == "number" and "integer" in types and exact(value) == (exact(value) or Decimal(0)).to_integral_value()


def identity(value: Any) -> Any:
    """What two values have in common that are equal as JSON Schema has it: 1 is 1.0, and not true."""
    if isinstance(value, list):
        return ("array", tuple(map(identity, value)))
    if isinstance(value, dict):
        return ("object", frozenset((name, identity(each)) for name, each in value.items()))
    number = exact(value)
    return (kind_of(value), value) if number is None else ("number", number)


def distinct(values: Sequence[Any]) -> list[Any]:
    """The values, each once."""
    return list({identity(value): value for value in reversed(values)}.values())[::-1]


def all_of(parts: Sequence[Schema]) -> Schema:
    """One schema for several that hold together."""
    flat: list[Schema] = []
    for part in parts:
        flat += part["allOf"] if isinstance(part, dict) and part.keys() == {"allOf"} else [part]
    if any(part is False for part in flat):
        return False
    left = [part for part in flat if part is not True]
    return True if not left else left[0] if len(left) == 1 else {"allOf": left}


def any_of(parts: Sequence[Schema]) -> Schema:
    """One schema for several of which one has to hold."""
    if any(part is True for part in parts):
        return True
    left = [part for part in parts if part is not False]
    return False if not left else left[0] if len(left) == 1 else {"anyOf": left}
