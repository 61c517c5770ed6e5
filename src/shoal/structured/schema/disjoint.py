"""Whether no value satisfies two schemas, as far as that is seen from their types, listed values, tags and bounds."""

from itertools import combinations
from typing import Any

from shoal.structured.schema.bounds import bounds_of
from shoal.structured.schema.finite import finite_values
from shoal.structured.schema.node import TYPES, Here, Rewrites, has_type, identity, types_of

_MOST = 200  # schemas that are compared with each other
_MOST_KEYS = 50
_MOST_LOOKS = 50_000  # at two schemas
_DEPTH = 6


def disjoint(rewriter: Rewrites, nodes: list[Any], here: Here, tag: str = "") -> bool:
    """No value satisfies two of these. `tag`: a property that all values have."""
    if len(nodes) > _MOST:
        return False
    found = [rewriter.followed(node, here.under("oneOf", i)) for i, node in enumerate(nodes)]
    if tag:
        found = [(_with(node, tag), at) for node, at in found]
    search = _DisjointSearch(rewriter)
    return all(search.apart(*one, *other, _DEPTH) for one, other in combinations(found, 2))


def _with(node: Any, tag: str) -> Any:
    required = node.get("required", []) if isinstance(node, dict) else None
    return {**node, "required": [*required, tag]} if isinstance(required, list) else node


def exclusive_keys(nodes: list[Any]) -> list[tuple[str, list[str]]] | None:
    """Of alternatives that ask for one property each: these, each with the others."""
    if len(nodes) > _MOST_KEYS:
        return None
    names = []
    for node in nodes:
        required = node.get("required") if isinstance(node, dict) and node.keys() == {"required"} else None
        if not isinstance(required, list) or len(required) != 1 or not isinstance(required[0], str):
            return None
        names.append(required[0])
    if len(set(names)) < len(names):
        return None
    return [(name, [other for other in names if other != name]) for name in names]


class _DisjointSearch:
    """Looks for what tells schemas apart, and gives up where that would take long."""

    def __init__(self, rewriter: Rewrites) -> None:
        self._rewriter = rewriter
        self._left = _MOST_LOOKS
        self._known: dict[int, tuple[set[str], frozenset[Any] | None]] = {}  # by the id() of a schema

    def apart(self, one: Any, here: Here, other: Any, there: Here, depth: int) -> bool:
        """No value satisfies both."""
        self._left -= 1
        one, here = self._rewriter.followed(one, here)
        other, there = self._rewriter.followed(other, there)
        if one is False or other is False:
            return True
        if not isinstance(one, dict) or not isinstance(other, dict) or depth == 0 or self._left < 0:
            return False
        first, second = self._rewriter.words(one), self._rewriter.words(other)
        kinds, values = self._values(one, first, here)
        others, more = self._values(other, second, there)
        common = kinds & others
        if values is not None and more is not None:
            return values.isdisjoint(more)
        return (
            not common
            or (common == {"object"} and self._tagged(first, here, second, there, depth))
            or (common <= {"integer", "fraction"} and not _meet(first, here, second, there))
            or self._parts(first, here, other, there, depth)
            or self._parts(second, there, one, here, depth)
        )

    def _values(self, node: Any, words: dict[str, Any], here: Here) -> tuple[set[str], frozenset[Any] | None]:
        """The types of what satisfies a schema, and all of it where that is listed; a number is an integer or has a
        fraction."""
        if id(node) not in self._known:
            values = finite_values(self._rewriter, node, here)
            types = set(types_of(words, here) or TYPES)
            kinds = (types - {"number"}) | {"integer", "fraction"} if "number" in types else types
            listed = None if values is None else frozenset(map(identity, values))
            self._known[id(node)] = (kinds if values is None else set(map(_kind, values)), listed)
        return self._known[id(node)]

    def _parts(self, words: dict[str, Any], at: Here, other: Any, there: Here, depth: int) -> bool:
        """Of what holds beside the keywords, one is apart from the other schema."""
        if "$ref" in words and len(words) > 1:
            found = self._rewriter.target("$ref", words["$ref"], at)
            if self.apart(found.node, at.at(found), other, there, depth - 1):
                return True
        for name, together in (("allOf", any), ("anyOf", all), ("oneOf", all)):
            nodes = words.get(name)
            if isinstance(nodes, list) and 0 < len(nodes) <= _MOST:
                steps = ((node, at.under(name, i)) for i, node in enumerate(nodes))
                if together(self.apart(node, place, other, there, depth - 1) for node, place in steps):
                    return True
        return False

    def _tagged(self, first: dict[str, Any], here: Here, second: dict[str, Any], there: Here, depth: int) -> bool:
        """A property that one of them requires has no value in common."""
        for one, at, other, place in ((first, here, second, there), (second, there, first, here)):
            required = one.get("required", [])
            for name in required if isinstance(required, list) else []:
                if not isinstance(name, str):
                    continue
                mine, yours = _property(one, name), _property(other, name)
                steps = at.under("properties", name), place.under("properties", name)
                if self.apart(mine, steps[0], yours, steps[1], depth - 1):
                    return True
        return False


def _property(words: dict[str, Any], name: str) -> Any:
    properties = words.get("properties")
    if isinstance(properties, dict) and name in properties:
        return properties[name]
    return words.get("additionalProperties", True) if "patternProperties" not in words else True


def _kind(value: Any) -> str:
    if has_type(value, ["integer"]):
        return "integer"
    return "fraction" if has_type(value, ["number"]) else next(name for name in TYPES if has_type(value, [name]))


def _meet(first: dict[str, Any], here: Here, second: dict[str, Any], there: Here) -> bool:
    one, other = bounds_of(first, here, integer=False), bounds_of(second, there, integer=False)
    for low, high in ((one, other), (other, one)):
        if low.low is None or high.high is None:
            continue
        if low.low > high.high or (low.low == high.high and (low.above_low or high.below_high)):
            return False
    return True
