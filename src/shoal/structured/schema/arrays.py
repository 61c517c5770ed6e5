"""Keywords of arrays."""

from itertools import permutations
from math import perm
from typing import Any

from shoal.structured.schema.finite import finite_values
from shoal.structured.schema.literals import is_plain, listed_schema
from shoal.structured.schema.node import Here, Rewrites, Schema, any_of, distinct, integer_of, malformed

_MOST_LISTS = 400  # that lists of different values are spelled out as
_MOST_PLACES = 8  # where an item that `contains` asks for is looked for
_MOST_ITEMS = 1 << 20
_APPLY = ("$ref", "$dynamicRef", "$recursiveRef", "allOf", "anyOf", "oneOf", "if", "contains")


def array_keywords(
    rewriter: Rewrites, words: dict[str, Any], types: list[str] | None, here: Here
) -> tuple[Schema, list[Schema]]:
    """The keywords of arrays, and what holds beside them. False: no array satisfies them."""
    first, place, rest, rest_place = _items(rewriter, words, here)
    least, most = integer_of(words, "minItems", here, 0) or 0, integer_of(words, "maxItems", here)
    extra: list[Schema] = []
    if "contains" in words:
        least, most, extra = _contains(rewriter, words, types, least, most, here)
    if most is not None and least > most:
        return False, []
    unique = words.get("uniqueItems", False)
    if not isinstance(unique, bool):
        raise malformed("uniqueItems", here, "be true or false", unique)
    if unique and (most is None or most > 1) and not (rest is False and len(first) <= 1):
        under = here.under(rest_place)
        lists = None if first or types != ["array"] else _different(rewriter, rest, least, most, under)
        if lists is not None:
            return True, [listed_schema(lists), *extra]
        rewriter.skip("uniqueItems", here)
    found: dict[str, Any] = {}
    if first:
        found["prefixItems"] = [
            rewriter.child(each, here, place, i, joined=bool(extra)) for i, each in enumerate(first)
        ]
    items = rewriter.child(rest, here, rest_place, joined=bool(extra))
    if items is not True:
        found["items"] = items
    if least:
        found["minItems"] = least
    if most is not None and most <= _MOST_ITEMS:  # no output has more
        found["maxItems"] = most
    return (found or True), extra


def _items(rewriter: Rewrites, words: dict[str, Any], here: Here) -> tuple[list[Any], str, Any, str]:
    """The schemas of the first items and of the rest, with the keywords they are under."""
    items = words.get("items", True)
    if isinstance(items, list):  # of older drafts
        return items, "items", words.get("additionalItems", True), "additionalItems"
    first = words.get("prefixItems", [])
    if not isinstance(first, list):
        raise malformed("prefixItems", here, "be a list", first)
    if first and rewriter.references.before_2020:
        rewriter.skip("prefixItems", here, "which the $schema does not know")
        first = []
    rest, rest_place = items, "items"
    unevaluated = words.get("unevaluatedItems", True)
    if "items" not in words and unevaluated is not True:
        if any(name in words for name in _APPLY):
            rewriter.skip("unevaluatedItems", here, "beside what applies other schemas")
        else:
            rest, rest_place = unevaluated, "unevaluatedItems"
    return first, "prefixItems", rest, rest_place


def _contains(
    rewriter: Rewrites, words: dict[str, Any], types: list[str] | None, least: int, most: int | None, here: Here
) -> tuple[int, int | None, list[Schema]]:
    """`contains` as places where the item may be, or as bounds on the length."""
    wanted, _ = rewriter.followed(words["contains"], here.under("contains"))
    at_least = integer_of(words, "minContains", here, 1) or 0
    at_most = integer_of(words, "maxContains", here)
    if wanted is True or wanted == {}:
        most = at_most if most is None else most if at_most is None else min(most, at_most)
        return max(least, at_least), most, []
    if at_least == 0 and at_most is None:
        return least, most, []
    if at_least == 1 and at_most is None and most is not None and most <= _MOST_PLACES:
        item = rewriter.child(words["contains"], here, "contains", joined=True)
        kind = {"type": types} if types else {}
        if item is False:
            return least, most, [any_of([])]
        places = range(most)
        return least, most, [any_of([{**kind, "prefixItems": [*[True] * i, item], "minItems": i + 1} for i in places])]
    for name in ("contains", "minContains", "maxContains"):
        if name in words:
            rewriter.skip(name, here, "" if most is None else f"beside maxItems above {_MOST_PLACES}")
    return least, most, []


def _different(rewriter: Rewrites, items: Any, least: int, most: int | None, here: Here) -> list[Any] | None:
    """All lists of different values, where there are few."""
    values = finite_values(rewriter, items, here)
    if values is None or len(values) > _MOST_LISTS or not is_plain(values):
        return None
    found = distinct(values)
    longest = len(found) if most is None else min(most, len(found))
    if sum(perm(len(found), length) for length in range(least, longest + 1)) > _MOST_LISTS:
        return None
    return [list(each) for length in range(least, longest + 1) for each in permutations(found, length)]
