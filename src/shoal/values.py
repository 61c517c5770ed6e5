"""Helpers for values from users: show them in messages, suggest similar names, parse numbers. Free of torch."""

import difflib
import math
import re
import reprlib
from collections.abc import Iterable

_SHOWN = 200  # characters of a wrong value


def shown(value: object) -> str:
    """Return the text that shows a wrong value in an error: its repr, shortened if it is long."""
    try:
        text = repr(value) if _is_short(value) else _shortened.repr(value)
    except ValueError:  # an integer of thousands of digits
        return "a number that is too long to be shown"
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def _is_short(value: object) -> bool:
    """Tell whether the repr of a value is fast to compute."""
    pending, left = [value], 10_000
    while pending and left > 0:
        each = pending.pop()
        if isinstance(each, str | bytes):
            left -= len(each)
        elif isinstance(each, list | tuple | dict):
            left -= 1 + len(each)
            pending.extend((each if not isinstance(each, dict) else [*each, *each.values()]) if left > 0 else ())
    return left > 0


_MIN_SIMILARITY = 0.75  # from 0 to 1; with difflib's own 0.6 unrelated words would be suggested
_MIN_PREFIX = 4


def closest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most similar to `name`, or None if no name is similar."""
    names = list(known)
    near = difflib.get_close_matches(name, names, 1, _MIN_SIMILARITY)
    if not near and len(name) >= _MIN_PREFIX:
        near = [each for each in names if each.startswith(name)]
    return near[0] if near else None


_DIGITS = re.compile(r"[+-]?[0-9]{1,1000}")
_DECIMAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


def whole_number(text: str, *, canonical: bool = False) -> int | None:
    """Parse an integer in decimal digits; None if the text is no integer.

    Unlike Python's `int` this refuses "1_0", " 5" and digits of other scripts. `canonical`: as in JSON, which refuses
    "+5" and "05" too.
    """
    if not _DIGITS.fullmatch(text):
        return None
    number = int(text)
    return None if canonical and str(number) != text else number


def decimal_number(text: str) -> float | None:
    """Parse a finite number with or without a decimal point; None if the text is none. See `whole_number`."""
    number = float(text) if _DECIMAL.fullmatch(text) else math.inf
    return number if math.isfinite(number) else None


_shortened = reprlib.Repr()
_shortened.maxlist = _shortened.maxdict = _shortened.maxtuple = _SHOWN
_shortened.maxstring = 2 * _SHOWN + 10  # so that the omitted middle begins after the characters that are shown
