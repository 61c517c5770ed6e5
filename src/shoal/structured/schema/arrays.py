"""Rewriting the keywords of arrays."""

from itertools import permutations
from math import perm
from typing import Any

from shoal.structured.schema.listed_values import listed_values
from shoal.structured.schema.literals import enum_schema, is_plain
from shoal.structured.schema.node import Location, Schema, SchemaRewriter, any_of, distinct, malformed, read_count

_MAX_LISTS = 400  # lists that `uniqueItems` is written out as
_MAX_PLACES = 8  # positions at which the item that `contains` requires may stand
_MAX_ITEMS = 1 << 20
# Keywords that apply other schemas to the same array, so that `unevaluatedItems` depends on them.
_APPLICATORS = ("$ref", "$dynamicRef", "$recursiveRef", "allOf", "anyOf", "oneOf", "if", "contains")


def array_keywords(
    rewriter: SchemaRewriter, keywords: dict[str, Any], types: list[str] | None, here: Location
) -> tuple[Schema, list[Schema]]:
    """Return the rewritten keywords of arrays, and schemas that must be satisfied in addition.

    The first is False if no array satisfies the keywords.
    """
    first, place, rest, rest_place = _read_items(rewriter, keywords, here)
    least, most = read_count(keywords, "minItems", here, 0) or 0, read_count(keywords, "maxItems", here)
    extra: list[Schema] = []
    if "contains" in keywords:
        least, most, extra = _contains(rewriter, keywords, types, least, most, here)
    if most is not None and least > most:
        return False, []
    unique = keywords.get("uniqueItems", False)
    if not isinstance(unique, bool):
        raise malformed("uniqueItems", here, "be true or false", unique)
    if unique and (most is None or most > 1) and not (rest is False and len(first) <= 1):
        under = here.under(rest_place)
        lists = None if first or types != ["array"] else _lists_of_distinct(rewriter, rest, least, most, under)
        if lists is not None:
            return True, [enum_schema(lists), *extra]
        rewriter.drop_keyword("uniqueItems", here)
    found: dict[str, Any] = {}
    if first:
        found["prefixItems"] = [
            rewriter.rewrite_child(each, here, place, i, joined=bool(extra)) for i, each in enumerate(first)
        ]
    items = rewriter.rewrite_child(rest, here, rest_place, joined=bool(extra))
    if items is not True:
        found["items"] = items
    if least:
        found["minItems"] = least
    if most is not None and most <= _MAX_ITEMS:  # no output has more
        found["maxItems"] = most
    return (found or True), extra


def _read_items(rewriter: SchemaRewriter, keywords: dict[str, Any], here: Location) -> tuple[list[Any], str, Any, str]:
    """Return the schemas of the first items, the keyword they stand under, the schema of the rest, and its keyword."""
    items = keywords.get("items", True)
    if isinstance(items, list):  # as older drafts write it
        return items, "items", keywords.get("additionalItems", True), "additionalItems"
    first = keywords.get("prefixItems", [])
    if not isinstance(first, list):
        raise malformed("prefixItems", here, "be a list", first)
    if first and rewriter.references.before_2020:
        rewriter.drop_keyword("prefixItems", here, "which the $schema does not know")
        first = []
    rest, rest_place = items, "items"
    unevaluated = keywords.get("unevaluatedItems", True)
    if "items" not in keywords and unevaluated is not True:
        if any(name in keywords for name in _APPLICATORS):
            rewriter.drop_keyword("unevaluatedItems", here, "beside keywords that apply other schemas")
        else:
            rest, rest_place = unevaluated, "unevaluatedItems"
    return first, "prefixItems", rest, rest_place


def _contains(
    rewriter: SchemaRewriter,
    keywords: dict[str, Any],
    types: list[str] | None,
    least: int,
    most: int | None,
    here: Location,
) -> tuple[int, int | None, list[Schema]]:
    """Return new values of minItems and maxItems, and schemas that must be satisfied in addition, for `contains`.

    It is written as one alternative for each position that the required item may have, or as bounds on the length.
    """
    wanted, _ = rewriter.follow(keywords["contains"], here.under("contains"))
    at_least = read_count(keywords, "minContains", here, 1) or 0
    at_most = read_count(keywords, "maxContains", here)
    if wanted is True or wanted == {}:
        most = at_most if most is None else most if at_most is None else min(most, at_most)
        return max(least, at_least), most, []
    if at_least == 0 and at_most is None:
        return least, most, []
    if at_least == 1 and at_most is None and most is not None and most <= _MAX_PLACES:
        item = rewriter.rewrite_child(keywords["contains"], here, "contains", joined=True)
        kind = {"type": types} if types else {}
        if item is False:
            return least, most, [any_of([])]
        places = range(most)
        return least, most, [any_of([{**kind, "prefixItems": [*[True] * i, item], "minItems": i + 1} for i in places])]
    for name in ("contains", "minContains", "maxContains"):
        if name in keywords:
            rewriter.drop_keyword(name, here, "" if most is None else f"beside maxItems above {_MAX_PLACES}")
    return least, most, []


def _lists_of_distinct(
    rewriter: SchemaRewriter, items: Any, least: int, most: int | None, here: Location
) -> list[Any] | None:
    """Return all lists without repetitions of the values that `items` allows, or None if there are too many."""
    values = listed_values(rewriter, items, here)
    if values is None or len(values) > _MAX_LISTS or not is_plain(values):
        return None
    found = distinct(values)
    longest = len(found) if most is None else min(most, len(found))
    if sum(perm(len(found), length) for length in range(least, longest + 1)) > _MAX_LISTS:
        return None
    return [list(each) for length in range(least, longest + 1) for each in permutations(found, length)]
