"""Keywords of numbers: what ends they give, and how they are said."""

from decimal import Decimal
from typing import Any

from shoal.errors import RequestError
from shoal.structured.schema import numbers
from shoal.structured.schema.node import Here, Rewrites, Schema, malformed


def number_keywords(rewriter: Rewrites, words: dict[str, Any], here: Here, *, integer: bool) -> Schema:
    """Keywords that the library obeys, or a terminal of our own. False: no number satisfies them."""
    bounds = bounds_of(words, here, integer=integer)
    multiple = multiple_of(words, here)
    if multiple is not None and integer:  # integers that are multiples of p/q are multiples of p
        multiple = Decimal(multiple.as_integer_ratio()[0])
    if integer:
        bounds = bounds.integers()
        multiple = None if multiple == 1 else multiple
    if bounds.empty:
        return False
    ends = [end for end in (bounds.low, bounds.high) if end is not None]
    plain = all(map(numbers.is_plain, ends))
    if plain and (multiple is None or numbers.is_plain_multiple(multiple, joined=here.joined)):
        return _plain_number(bounds, multiple)
    zeros = numbers.zeros(multiple) if multiple is not None and integer and not here.joined else None
    if multiple is not None and zeros is None:
        rewriter.skip("multipleOf", here, "of so large a number, or with bounds of so many digits")
        return (
            _plain_number(bounds, None)
            if plain
            else {numbers.TERMINAL: numbers.terminal(bounds), numbers.PLACE: here.place}
        )
    return {numbers.TERMINAL: numbers.terminal(bounds, zeros or 0), numbers.PLACE: here.place}


def _plain_number(bounds: numbers.Bounds, multiple: Decimal | None) -> Schema:
    found: dict[str, Any] = {}
    if bounds.low is not None:
        found["exclusiveMinimum" if bounds.above_low else "minimum"] = numbers.written(bounds.low)
    if bounds.high is not None:
        found["exclusiveMaximum" if bounds.below_high else "maximum"] = numbers.written(bounds.high)
    if multiple is not None:
        found["multipleOf"] = numbers.written(multiple)
    return found or True


def number_of(words: dict[str, Any], name: str, here: Here) -> Decimal | None:
    """
    Raises:
        RequestError: it is no number, or one with hundreds of digits.
    """
    if name not in words:
        return None
    found = numbers.exact(words[name])
    if found is None:
        raise malformed(name, here, "be a number", words[name])
    if not numbers.in_reach(found):
        raise RequestError(f"structured_outputs.json can't be obeyed: {name} at {here.place} has hundreds of digits")
    return found


def bounds_of(words: dict[str, Any], here: Here, *, integer: bool) -> numbers.Bounds:
    """The ends that the keywords of numbers give, draft 4's `exclusiveMinimum: true` included."""
    ends: dict[str, tuple[Decimal | None, bool]] = {}
    for side, tighter in (("Minimum", max), ("Maximum", min)):
        end = number_of(words, side.lower(), here)
        exclusive = words.get(f"exclusive{side}")
        if isinstance(exclusive, bool):
            ends[side] = (end, exclusive and end is not None)
            continue
        other = number_of(words, f"exclusive{side}", here)
        known = [each for each in (end, other) if each is not None]
        best = tighter(known) if known else None
        ends[side] = (best, best is not None and best == other)
    (low, above), (high, below) = ends["Minimum"], ends["Maximum"]
    return numbers.Bounds(low, high, above, below, integer)


def multiple_of(words: dict[str, Any], here: Here) -> Decimal | None:
    found = number_of(words, "multipleOf", here)
    if found is not None and found <= 0:
        raise malformed("multipleOf", here, "be above 0", words["multipleOf"])
    return found
