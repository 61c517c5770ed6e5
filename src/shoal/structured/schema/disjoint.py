"""Finding out whether two schemas are disjoint: no value satisfies both.

This is decided by their types, listed values, bounds and the properties they require. Schemas that are disjoint for
another reason are not recognized.
"""

from itertools import combinations
from typing import Any

from shoal.structured.schema.bounds import read_bounds
from shoal.structured.schema.listed_values import listed_values
from shoal.structured.schema.node import TYPES, Location, SchemaRewriter, has_type, identity, read_types

_MAX_SCHEMAS = 200  # schemas in one keyword
_MAX_KEYS = 50
_MAX_COMPARISONS = 50_000  # of two schemas
_MAX_DEPTH = 6


def all_disjoint(rewriter: SchemaRewriter, nodes: list[Any], here: Location, tag: str = "") -> bool:
    """Return whether no value satisfies two of the schemas of a `oneOf`. `tag`: a property that every value has."""
    if len(nodes) > _MAX_SCHEMAS:
        return False
    found = [rewriter.follow(node, here.under("oneOf", i)) for i, node in enumerate(nodes)]
    if tag:
        found = [(_with_required(node, tag), at) for node, at in found]
    search = _DisjointSearch(rewriter)
    return all(search.are_disjoint(*one, *other, _MAX_DEPTH) for one, other in combinations(found, 2))


def _with_required(node: Any, tag: str) -> Any:
    required = node.get("required", []) if isinstance(node, dict) else None
    return {**node, "required": [*required, tag]} if isinstance(required, list) else node


def exclusive_required_keys(nodes: list[Any]) -> list[tuple[str, list[str]]] | None:
    """Return the property that each alternative requires, together with those that the other alternatives require.

    None unless each alternative is nothing but `required` with one property, and these properties are different.
    """
    if len(nodes) > _MAX_KEYS:
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
    """Compares schemas, and gives up (they count as not disjoint) when that would take too long."""

    def __init__(self, rewriter: SchemaRewriter) -> None:
        self._rewriter = rewriter
        self._left = _MAX_COMPARISONS
        self._known: dict[int, tuple[set[str], frozenset[Any] | None]] = {}  # by the id() of a schema

    def are_disjoint(self, one: Any, here: Location, other: Any, there: Location, depth: int) -> bool:
        """Return whether no value satisfies both `one` (at `here`) and `other` (at `there`)."""
        self._left -= 1
        one, here = self._rewriter.follow(one, here)
        other, there = self._rewriter.follow(other, there)
        if one is False or other is False:
            return True
        if not isinstance(one, dict) or not isinstance(other, dict) or depth == 0 or self._left < 0:
            return False
        first, second = self._rewriter.keywords(one), self._rewriter.keywords(other)
        kinds, values = self._values(one, first, here)
        others, more = self._values(other, second, there)
        common = kinds & others
        if values is not None and more is not None:
            return values.isdisjoint(more)
        return (
            not common
            or (common == {"object"} and self._differ_in_property(first, here, second, there, depth))
            or (common <= {"integer", "fraction"} and not _bounds_overlap(first, here, second, there))
            or self._is_part_disjoint(first, here, other, there, depth)
            or self._is_part_disjoint(second, there, one, here, depth)
        )

    def _values(self, node: Any, keywords: dict[str, Any], here: Location) -> tuple[set[str], frozenset[Any] | None]:
        """Return the types of the values that satisfy a schema, and the values if the schema lists them.

        The type "number" is split into "integer" and "fraction".
        """
        if id(node) not in self._known:
            values = listed_values(self._rewriter, node, here)
            types = set(read_types(keywords, here) or TYPES)
            kinds = (types - {"number"}) | {"integer", "fraction"} if "number" in types else types
            listed = None if values is None else frozenset(map(identity, values))
            self._known[id(node)] = (kinds if values is None else set(map(_kind, values)), listed)
        return self._known[id(node)]

    def _is_part_disjoint(
        self, keywords: dict[str, Any], at: Location, other: Any, there: Location, depth: int
    ) -> bool:
        """Return whether a part of the first schema is disjoint from the other one, so that the whole is too.

        Parts are the schemas that `$ref`, `allOf`, `anyOf` and `oneOf` apply to the same value.
        """
        if "$ref" in keywords and len(keywords) > 1:
            found = self._rewriter.resolve_reference("$ref", keywords["$ref"], at)
            if self.are_disjoint(found.node, at.at(found), other, there, depth - 1):
                return True
        for name, together in (("allOf", any), ("anyOf", all), ("oneOf", all)):
            nodes = keywords.get(name)
            if isinstance(nodes, list) and 0 < len(nodes) <= _MAX_SCHEMAS:
                steps = ((node, at.under(name, i)) for i, node in enumerate(nodes))
                if together(self.are_disjoint(node, place, other, there, depth - 1) for node, place in steps):
                    return True
        return False

    def _differ_in_property(
        self, first: dict[str, Any], here: Location, second: dict[str, Any], there: Location, depth: int
    ) -> bool:
        """Return whether one of two object schemas requires a property for which they allow no common value."""
        for one, at, other, place in ((first, here, second, there), (second, there, first, here)):
            required = one.get("required", [])
            for name in required if isinstance(required, list) else []:
                if not isinstance(name, str):
                    continue
                first_schema, second_schema = _property_schema(one, name), _property_schema(other, name)
                steps = at.under("properties", name), place.under("properties", name)
                if self.are_disjoint(first_schema, steps[0], second_schema, steps[1], depth - 1):
                    return True
        return False


def _property_schema(keywords: dict[str, Any], name: str) -> Any:
    properties = keywords.get("properties")
    if isinstance(properties, dict) and name in properties:
        return properties[name]
    return keywords.get("additionalProperties", True) if "patternProperties" not in keywords else True


def _kind(value: Any) -> str:
    if has_type(value, ["integer"]):
        return "integer"
    return "fraction" if has_type(value, ["number"]) else next(name for name in TYPES if has_type(value, [name]))


def _bounds_overlap(first: dict[str, Any], here: Location, second: dict[str, Any], there: Location) -> bool:
    one, other = read_bounds(first, here, integer=False), read_bounds(second, there, integer=False)
    for low, high in ((one, other), (other, one)):
        if low.low is None or high.high is None:
            continue
        if low.low > high.high or (low.low == high.high and (low.low_excluded or high.high_excluded)):
            return False
    return True
