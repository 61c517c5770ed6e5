"""Helpers for values from users: show them in messages, suggest similar names, parse numbers. Free of torch."""

import difflib
import math
import re
import reprlib
from collections.abc import Iterable

from shoal.errors import ConfigError

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
    """Return the integer that a text writes in ASCII digits; None if it is no integer.

    Python's own `int` would also take "1_0", " 5" and the digits of any script.

    Args:
        canonical: take only the form that JSON has, so neither "+5" nor "05".
    """
    if not _DIGITS.fullmatch(text):
        return None
    number = int(text)
    return None if canonical and str(number) != text else number


def decimal_number(text: str) -> float | None:
    """Return the finite number that a text writes in ASCII digits, with or without a point; None if it is none."""
    number = float(text) if _DECIMAL.fullmatch(text) else math.inf
    return number if math.isfinite(number) else None


_shortened = reprlib.Repr()
_shortened.maxlist = _shortened.maxdict = _shortened.maxtuple = _SHOWN
_shortened.maxstring = 2 * _SHOWN + 10  # what is left out is in the middle, behind what is shown


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str, flag: str) -> int:
    """Read a number of bytes: `1500000`, `512MiB`, `2GiB`, `1.5g`.

    Raises:
        ConfigError: the text is something else.
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([kmgt]i?)?b?\s*", text.lower(), re.ASCII)
    if not match:
        raise ConfigError(f"{flag} takes a number of bytes such as 512MiB or 2GiB, got {text!r}")
    unit = _UNITS[match[2] or ""]
    return int(match[1]) * unit if match[1].isdigit() else int(float(match[1]) * unit)


def format_bytes(count: float) -> str:
    """Return a number of bytes as people read it: `1.50 GiB`."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} bytes"


def numbered(count: int, noun: str) -> str:
    """Return a number of things: `1 rank`, `2 ranks`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
