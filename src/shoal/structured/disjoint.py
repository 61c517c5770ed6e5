"""Whether no value satisfies two schemas, as far as that is seen from their types, listed values, tags and bounds."""

from itertools import combinations
from typing import Any

from shoal.structured.bounds import bounds_of
from shoal.structured.finite import finite_values
from shoal.structured.node import TYPES, Here, Rewrites, has_type, same, types_of

_MOST = 200  # schemas that are compared with each other
_DEPTH = 6


def disjoint(rewriter: Rewrites, nodes: list[Any], here: Here) -> bool:
    """No value satisfies two of these."""
    if len(nodes) > _MOST:
        return False
    places = [(node, here.under("oneOf", i)) for i, node in enumerate(nodes)]
    return all(_apart(rewriter, *one, *other, _DEPTH) for one, other in combinations(places, 2))


def exclusive_keys(nodes: list[Any]) -> list[tuple[str, list[str]]] | None:
    """Of alternatives that ask for one property each: these, each with the others."""
    names = []
    for node in nodes:
        required = node.get("required") if isinstance(node, dict) and node.keys() == {"required"} else None
        if not isinstance(required, list) or len(required) != 1 or not isinstance(required[0], str):
            return None
        names.append(required[0])
    if len(set(names)) < len(names):
        return None
    return [(name, [other for other in names if other != name]) for name in names]


def _apart(rewriter: Rewrites, one: Any, here: Here, other: Any, there: Here, depth: int) -> bool:
    one, here = rewriter.followed(one, here)
    other, there = rewriter.followed(other, there)
    if one is False or other is False:
        return True
    if not isinstance(one, dict) or not isinstance(other, dict) or depth == 0:
        return False
    first, second = rewriter.words(one), rewriter.words(other)
    kinds, others = _kinds(rewriter, one, first, here), _kinds(rewriter, other, second, there)
    common = kinds & others
    values, more = finite_values(rewriter, one, here), finite_values(rewriter, other, there)
    if values is not None and more is not None:
        return not any(same(value, each) for value in values for each in more)
    return (
        not common
        or (common == {"object"} and _tagged_apart(rewriter, first, here, second, there, depth))
        or (common <= {"integer", "fraction"} and not _meet(first, here, second, there))
        or _parts_apart(rewriter, first, here, other, there, depth)
        or _parts_apart(rewriter, second, there, one, here, depth)
    )


def _parts_apart(rewriter: Rewrites, words: dict[str, Any], at: Here, other: Any, there: Here, depth: int) -> bool:
    """Of what holds beside the keywords, one is apart from the other schema."""
    if "$ref" in words and len(words) > 1:
        found = rewriter.target("$ref", words["$ref"], at)
        if _apart(rewriter, found.node, at.at(found), other, there, depth - 1):
            return True
    for name, together in (("allOf", any), ("anyOf", all), ("oneOf", all)):
        nodes = words.get(name)
        if isinstance(nodes, list) and 0 < len(nodes) <= _MOST:
            steps = ((node, at.under(name, i)) for i, node in enumerate(nodes))
            if together(_apart(rewriter, node, place, other, there, depth - 1) for node, place in steps):
                return True
    return False


def _tagged_apart(
    rewriter: Rewrites, first: dict[str, Any], here: Here, second: dict[str, Any], there: Here, depth: int
) -> bool:
    """A property that one of them requires has no value in common."""
    for one, at, other, place in ((first, here, second, there), (second, there, first, here)):
        required = one.get("required", [])
        for name in required if isinstance(required, list) else []:
            if not isinstance(name, str):
                continue
            mine, yours = _property(one, name), _property(other, name)
            steps = at.under("properties", name), place.under("properties", name)
            if _apart(rewriter, mine, steps[0], yours, steps[1], depth - 1):
                return True
    return False


def _property(words: dict[str, Any], name: str) -> Any:
    properties = words.get("properties")
    if isinstance(properties, dict) and name in properties:
        return properties[name]
    return words.get("additionalProperties", True) if "patternProperties" not in words else True


def _kinds(rewriter: Rewrites, node: Any, words: dict[str, Any], here: Here) -> set[str]:
    """The types of values that satisfy it; a number is an integer or has a fraction."""
    types = types_of(words, here)
    values = finite_values(rewriter, node, here)
    if values is not None:
        return {_kind(value) for value in values}
    found = set(TYPES if types is None else types)
    return (found - {"number"}) | {"integer", "fraction"} if "number" in found else found


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
