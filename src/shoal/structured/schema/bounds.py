"""Rewriting the keywords of numbers: bounds and `multipleOf`."""

from decimal import Decimal
from typing import Any

from shoal.structured.schema import numbers
from shoal.structured.schema.node import Location, Schema, SchemaRewriter, malformed
from shoal.structured.schema.schema_error import schema_error


def number_keywords(rewriter: SchemaRewriter, keywords: dict[str, Any], here: Location, *, integer: bool) -> Schema:
    """Return keywords that the library obeys, or a terminal of our own; False if no number satisfies the keywords.

    Args:
        integer: only integers are allowed.
    """
    bounds = read_bounds(keywords, here, integer=integer)
    multiple = read_multiple(keywords, here)
    if multiple is not None and integer:  # an integer is a multiple of p/q (in lowest terms) if it is one of p
        multiple = Decimal(multiple.as_integer_ratio()[0])
    if integer:
        bounds = bounds.integer_bounds()
        multiple = None if multiple == 1 else multiple
    if bounds.empty:
        return False
    ends = [end for end in (bounds.low, bounds.high) if end is not None]
    plain = all(map(numbers.is_plain, ends))
    if plain and (multiple is None or numbers.is_plain_multiple(multiple, joined=here.joined)):
        return _plain_number(bounds, multiple)
    zeros = numbers.power_of_ten(multiple) if multiple is not None and integer and not here.joined else None
    if multiple is not None and zeros is None:
        rewriter.drop_keyword("multipleOf", here, "of such a large number, or with bounds of so many digits")
        return (
            _plain_number(bounds, None)
            if plain
            else {numbers.TERMINAL: numbers.terminal(bounds), numbers.PLACE: here.pointer}
        )
    return {numbers.TERMINAL: numbers.terminal(bounds, zeros or 0), numbers.PLACE: here.pointer}


def _plain_number(bounds: numbers.Bounds, multiple: Decimal | None) -> Schema:
    found: dict[str, Any] = {}
    if bounds.low is not None:
        found["exclusiveMinimum" if bounds.low_excluded else "minimum"] = numbers.to_json_number(bounds.low)
    if bounds.high is not None:
        found["exclusiveMaximum" if bounds.high_excluded else "maximum"] = numbers.to_json_number(bounds.high)
    if multiple is not None:
        found["multipleOf"] = numbers.to_json_number(multiple)
    return found or True


def read_number(keywords: dict[str, Any], name: str, here: Location) -> Decimal | None:
    """Return the number that a keyword gives, or None if the keyword is missing.

    Raises:
        RequestError: the value is not a number, or has hundreds of digits.
    """
    if name not in keywords:
        return None
    found = numbers.to_decimal(keywords[name])
    if found is None:
        raise malformed(name, here, "be a number", keywords[name])
    if not numbers.is_spellable(found):
        raise schema_error(f"can't be obeyed: {name} at {here.pointer} has hundreds of digits")
    return found


def read_bounds(keywords: dict[str, Any], here: Location, *, integer: bool) -> numbers.Bounds:
    """Return the bounds that the keywords of a schema give. Draft 4's `exclusiveMinimum: true` is understood too."""
    ends: dict[str, tuple[Decimal | None, bool]] = {}
    for side, tighter in (("Minimum", max), ("Maximum", min)):
        end = read_number(keywords, side.lower(), here)
        exclusive = keywords.get(f"exclusive{side}")
        if isinstance(exclusive, bool):
            ends[side] = (end, exclusive and end is not None)
            continue
        other = read_number(keywords, f"exclusive{side}", here)
        known = [each for each in (end, other) if each is not None]
        best = tighter(known) if known else None
        ends[side] = (best, best is not None and best == other)
    (low, above), (high, below) = ends["Minimum"], ends["Maximum"]
    return numbers.Bounds(low, high, above, below, integer)


def read_multiple(keywords: dict[str, Any], here: Location) -> Decimal | None:
    found = read_number(keywords, "multipleOf", here)
    if found is not None and found <= 0:
        raise malformed("multipleOf", here, "be above 0", keywords["multipleOf"])
    return found
