"""Exact numbers of a JSON schema, of any length.

llguidance reads numbers as doubles and computes with 64 bits, so it obeys exactly only plain numbers: those with at
most 15 digits. For every other number we write a terminal of its grammar language, which matches the digits: "at least
12" is "three or more digits, or 2 to 9 and a digit, or 1 and 2 to 9".
"""

from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from fractions import Fraction
from typing import Any

TERMINAL = "x-number"  # a keyword of our own: numbers must match this terminal
PLACE = "x-place"  # a keyword beside it: where in the user's schema the numbers were described
_PLAIN_DIGITS = 15  # a number with this many digits is the same after conversion to a double and back
_MAX_DIGITS = 400  # before and after the decimal point; doubles end at 10^308
_LARGEST_JOINED = 10
_LARGEST_MULTIPLE = 10_000  # the library builds a state for each remainder: a million would take ten seconds


@dataclass(frozen=True, slots=True)
class Bounds:
    """The numbers, or integers, between two ends. An end that is None does not limit them."""

    low: Decimal | None = None
    high: Decimal | None = None
    low_excluded: bool = False
    high_excluded: bool = False
    integer: bool = False

    @property
    def empty(self) -> bool:
        if self.low is None or self.high is None:
            return False
        return self.low > self.high or (self.low == self.high and (self.low_excluded or self.high_excluded))

    def integer_bounds(self) -> "Bounds":
        """Return bounds for the same integers, whose ends are integers and included."""
        low, high = self.low, self.high
        if low is not None:
            low = Decimal(ceiling(low) + (self.low_excluded and low == ceiling(low)))
        if high is not None:
            high = Decimal(floor(high) - (self.high_excluded and high == floor(high)))
        return Bounds(low, high, integer=True)

    def contains_number(self, number: Decimal) -> bool:
        if self.integer and number != ceiling(number):
            return False
        if self.low is not None and (number < self.low or (number == self.low and self.low_excluded)):
            return False
        return self.high is None or number < self.high or (number == self.high and not self.high_excluded)


def to_decimal(value: Any) -> Decimal | None:
    """Return a JSON number as a Decimal, or None if the value is not a number.

    A float becomes the shortest decimal number that is read as the same float.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return None
    return value if isinstance(value, Decimal) else Decimal(repr(value) if isinstance(value, float) else value)


def is_spellable(number: Decimal) -> bool:
    """Return whether a number has fewer than 400 digits on each side of the decimal point when it is written out."""
    _, digits, exponent = number.as_tuple()
    if not isinstance(exponent, int):
        return False
    return not number or (number.adjusted() < _MAX_DIGITS and -exponent < _MAX_DIGITS and len(digits) < _MAX_DIGITS)


def ceiling(number: Decimal) -> int:
    return int(number.to_integral_value(rounding=ROUND_CEILING))


def floor(number: Decimal) -> int:
    return int(number.to_integral_value(rounding=ROUND_FLOOR))


def is_plain(number: Decimal) -> bool:
    """Return whether a number has at most 15 digits, so that llguidance obeys it exactly."""
    whole, fraction = _digits(abs(number))
    return len(whole) + len(fraction) <= _PLAIN_DIGITS


def to_json_number(number: Decimal) -> int | float:
    """Return a plain number as it is written in JSON."""
    return int(number) if number == ceiling(number) else float(number)


def is_plain_multiple(number: Decimal, *, joined: bool) -> bool:
    """Return whether llguidance can check for multiples of this number exactly and quickly.

    `joined`: the schema may be combined with others that have `multipleOf` too; the library then computes their least
    common multiple in 32 bits.
    """
    value, exponent = float(number), 0
    while value % 1 and exponent < 20:  # the library computes the coefficient and the power of ten in this way
        value *= 10
        exponent += 1
    if joined and (value > _LARGEST_JOINED or exponent > 2):
        return False
    return value <= _LARGEST_MULTIPLE and Fraction(value) == Fraction(number) * 10**exponent


def power_of_ten(number: Decimal) -> int | None:
    """Return n if the number is 10**n for an n of 0 or more, else None."""
    text = str(ceiling(number))
    return len(text) - 1 if number == ceiling(number) and text == "1" + "0" * (len(text) - 1) else None


def literal(number: Decimal) -> str:
    """Return a terminal that matches one spelling of the number, without needless zeros."""
    whole, fraction = _digits(abs(number))
    text = ("-" if number < 0 else "") + whole + (f".{fraction}" if fraction else "")
    return f'"{text}"'


def terminal(bounds: Bounds, ending_zeros: int = 0) -> str:
    """Return a terminal for the numbers within bounds that are not empty.

    `ending_zeros`: only for integers that are multiples of this power of ten.
    """
    positive, negative = [], []
    low, high = bounds.low, bounds.high
    if high is None or high >= 0:
        positive.append(_pattern(_ANY[bounds.integer]))
        if low is not None and low > 0:
            positive.append(_pattern(_at_least(low, bounds.low_excluded, bounds.integer)))
        if low == 0 and bounds.low_excluded:
            positive.append(_pattern(_at_least(low, True, bounds.integer)))
        if high is not None:
            positive.append(_pattern(_at_most(high, bounds.high_excluded, bounds.integer)))
    if low is None or low < 0:
        least, open_end = (-high, bounds.high_excluded) if high is not None and high < 0 else (Decimal(0), True)
        negative = [_pattern(_ANY[bounds.integer]), _pattern(_at_least(least, open_end, bounds.integer))]
        if low is not None:
            negative.append(_pattern(_at_most(-low, bounds.low_excluded, bounds.integer)))
    if ending_zeros:
        ends = _pattern(f"0|[0-9]+0{{{ending_zeros}}}")
        positive, negative = [*positive, ends] if positive else [], [*negative, ends] if negative else []
    sides = [f"({' & '.join(positive)})"] if positive and not (high == 0 and bounds.high_excluded) else []
    sides += [f'("-" ({" & ".join(negative)}))'] if negative else []
    return " | ".join(sides)


_ANY = {True: "0|[1-9][0-9]*", False: r"(0|[1-9][0-9]*)(\.[0-9]+)?"}


def _pattern(regex: str) -> str:
    return f"/{regex}/"


def _digits(number: Decimal) -> tuple[str, str]:
    """Return the digits before and after the decimal point of a number >= 0, without needless zeros."""
    whole, _, fraction = f"{number:f}".partition(".")
    return whole.lstrip("0") or "0", fraction.rstrip("0")


def _at_least(number: Decimal, excluded: bool, integer: bool) -> str:
    """Return a pattern that matches numbers >= `number` (or > `number` if it is excluded), where `number` >= 0.

    It matches digits without a sign. `integer`: only integers.
    """
    whole, fraction = _digits(number)
    tail = "" if integer else r"(\.[0-9]+)?"
    found = [f"[1-9][0-9]{{{len(whole)},}}{tail}"]
    for i, digit in enumerate(whole):
        if digit < "9":
            found.append(f"{whole[:i]}[{int(digit) + 1}-9][0-9]{{{len(whole) - i - 1}}}{tail}")
    if integer:
        return "|".join(found + ([] if excluded else [whole]))
    start = rf"{whole}\."
    for i, digit in enumerate(fraction):
        if digit < "9":
            found.append(rf"{start}{fraction[:i]}[{int(digit) + 1}-9][0-9]*")
    if excluded:
        found.append(rf"{start}{fraction}[0-9]*[1-9][0-9]*")
    else:
        found.append(rf"{start}{fraction}[0-9]*" if fraction else rf"{whole}(\.[0-9]+)?")
    return "|".join(found)


def _at_most(number: Decimal, excluded: bool, integer: bool) -> str:
    """Return a pattern that matches numbers from 0 to `number` (or below `number` if it is excluded).

    It matches digits without a sign. `integer`: only integers.
    """
    whole, fraction = _digits(number)
    tail = "" if integer else r"(\.[0-9]+)?"
    found = [f"(0|[1-9][0-9]{{0,{len(whole) - 2}}}){tail}"] if len(whole) > 1 else []
    for i, digit in enumerate(whole):
        least = 1 if i == 0 and len(whole) > 1 else 0
        if int(digit) > least:
            found.append(f"{whole[:i]}[{least}-{int(digit) - 1}][0-9]{{{len(whole) - i - 1}}}{tail}")
    if integer:
        return "|".join(found + ([] if excluded else [whole])) or "[^0-9]"
    start = rf"{whole}\."
    for i, digit in enumerate(fraction):
        if digit > "0":
            found.append(rf"{start}{fraction[:i]}[0-{int(digit) - 1}][0-9]*")
        found.append(rf"{start}{fraction[: i + 1]}" if i + 1 < len(fraction) else whole)
    if not excluded:
        found.append(rf"{start}{fraction}0*" if fraction else rf"{whole}(\.0+)?")
    return "|".join(found) or "[^0-9]"
