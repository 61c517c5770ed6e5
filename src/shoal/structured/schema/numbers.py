"""Numbers of a JSON schema, exactly: llguidance reads them as doubles and counts in 64 bits.

What fits is left to it. Everything else becomes a terminal of its grammar language, in which a number is matched by its
digits: "at least 12" is "three digits or more, or 2 to 9 and a digit, or 1 and 2 to 9".
"""

from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from fractions import Fraction
from typing import Any

TERMINAL = "x-number"  # a keyword of our own: the number is matched by this terminal
PLACE = "x-place"  # beside it: where it was asked for
_PLAIN_DIGITS = 15  # so many make the way through a double and back
_MOST_DIGITS = 400  # before and behind the point: doubles end at 10^308
_LARGEST_JOINED = 10
_LARGEST_MULTIPLE = 10_000  # the library builds a state for each remainder: a million take ten seconds


@dataclass(frozen=True, slots=True)
class Bounds:
    """Which numbers are meant: between two ends, of which each may be missing or not be part of it."""

    low: Decimal | None = None
    high: Decimal | None = None
    above_low: bool = False
    below_high: bool = False
    integer: bool = False

    @property
    def empty(self) -> bool:
        if self.low is None or self.high is None:
            return False
        return self.low > self.high or (self.low == self.high and (self.above_low or self.below_high))

    def integers(self) -> "Bounds":
        """The same integers, by ends that are integers and part of it."""
        low, high = self.low, self.high
        if low is not None:
            low = Decimal(ceiling(low) + (self.above_low and low == ceiling(low)))
        if high is not None:
            high = Decimal(floor(high) - (self.below_high and high == floor(high)))
        return Bounds(low, high, integer=True)

    def holds(self, number: Decimal) -> bool:
        if self.integer and number != ceiling(number):
            return False
        above = self.low is None or number > self.low or (number == self.low and not self.above_low)
        return above and (self.high is None or number < self.high or (number == self.high and not self.below_high))


def exact(value: Any) -> Decimal | None:
    """A number of JSON, None where it is none. A double stands for the shortest text that gives it."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return None
    return value if isinstance(value, Decimal) else Decimal(repr(value) if isinstance(value, float) else value)


def in_reach(number: Decimal) -> bool:
    """It can be spelled without thousands of zeros."""
    _, digits, exponent = number.as_tuple()
    if not isinstance(exponent, int):
        return False
    return not number or (number.adjusted() < _MOST_DIGITS and -exponent < _MOST_DIGITS and len(digits) < _MOST_DIGITS)


def ceiling(number: Decimal) -> int:
    return int(number.to_integral_value(rounding=ROUND_CEILING))


def floor(number: Decimal) -> int:
    return int(number.to_integral_value(rounding=ROUND_FLOOR))


def is_plain(number: Decimal) -> bool:
    """llguidance obeys it exactly."""
    whole, fraction = _digits(abs(number))
    return len(whole) + len(fraction) <= _PLAIN_DIGITS


def written(number: Decimal) -> int | float:
    """A plain number, as it is put into JSON."""
    return int(number) if number == ceiling(number) else float(number)


def is_plain_multiple(number: Decimal, *, joined: bool) -> bool:
    """llguidance can hold numbers against being a multiple of this, in a time to speak of. `joined`: and of others
    beside it, of which it takes the least common multiple in 32 bits."""
    value, exponent = float(number), 0
    while value % 1 and exponent < 20:  # as the library finds the coefficient and the power of ten
        value *= 10
        exponent += 1
    if joined and (value > _LARGEST_JOINED or exponent > 2):
        return False
    return value <= _LARGEST_MULTIPLE and Fraction(value) == Fraction(number) * 10**exponent


def zeros(number: Decimal) -> int | None:
    """How many zeros a multiple ends in, where that is all: None for no power of ten."""
    text = str(ceiling(number))
    return len(text) - 1 if number == ceiling(number) and text == "1" + "0" * (len(text) - 1) else None


def literal(number: Decimal) -> str:
    """A terminal for one number, spelled one way."""
    whole, fraction = _digits(abs(number))
    text = ("-" if number < 0 else "") + whole + (f".{fraction}" if fraction else "")
    return f'"{text}"'


def terminal(bounds: Bounds, ending_zeros: int = 0) -> str:
    """A terminal for the numbers within bounds, which aren't empty."""
    positive, negative = [], []
    low, high = bounds.low, bounds.high
    if high is None or high >= 0:
        positive.append(_pattern(_ANY[bounds.integer]))
        if low is not None and low > 0:
            positive.append(_pattern(_at_least(low, bounds.above_low, bounds.integer)))
        if low == 0 and bounds.above_low:
            positive.append(_pattern(_at_least(low, True, bounds.integer)))
        if high is not None:
            positive.append(_pattern(_at_most(high, bounds.below_high, bounds.integer)))
    if low is None or low < 0:
        least, open_end = (-high, bounds.below_high) if high is not None and high < 0 else (Decimal(0), True)
        negative = [_pattern(_ANY[bounds.integer]), _pattern(_at_least(least, open_end, bounds.integer))]
        if low is not None:
            negative.append(_pattern(_at_most(-low, bounds.above_low, bounds.integer)))
    if ending_zeros:
        ends = _pattern(f"0|[0-9]+0{{{ending_zeros}}}")
        positive, negative = [*positive, ends] if positive else [], [*negative, ends] if negative else []
    sides = [f"({' & '.join(positive)})"] if positive and not (high == 0 and bounds.below_high) else []
    sides += [f'("-" ({" & ".join(negative)}))'] if negative else []
    return " | ".join(sides)


_ANY = {True: "0|[1-9][0-9]*", False: r"(0|[1-9][0-9]*)(\.[0-9]+)?"}


def _pattern(regex: str) -> str:
    return f"/{regex}/"


def _digits(number: Decimal) -> tuple[str, str]:
    """Of a number that is not negative: before and behind the point, without zeros that say nothing."""
    whole, _, fraction = f"{number:f}".partition(".")
    return whole.lstrip("0") or "0", fraction.rstrip("0")


def _at_least(number: Decimal, above: bool, integer: bool) -> str:
    """A pattern for the spellings, without a sign, of what is at least (or above) a number that is not negative."""
    whole, fraction = _digits(number)
    tail = "" if integer else r"(\.[0-9]+)?"
    found = [f"[1-9][0-9]{{{len(whole)},}}{tail}"]
    for i, digit in enumerate(whole):
        if digit < "9":
            found.append(f"{whole[:i]}[{int(digit) + 1}-9][0-9]{{{len(whole) - i - 1}}}{tail}")
    if integer:
        return "|".join(found + ([] if above else [whole]))
    start = rf"{whole}\."
    for i, digit in enumerate(fraction):
        if digit < "9":
            found.append(rf"{start}{fraction[:i]}[{int(digit) + 1}-9][0-9]*")
    if above:
        found.append(rf"{start}{fraction}[0-9]*[1-9][0-9]*")
    else:
        found.append(rf"{start}{fraction}[0-9]*" if fraction else rf"{whole}(\.[0-9]+)?")
    return "|".join(found)


def _at_most(number: Decimal, below: bool, integer: bool) -> str:
    """As `_at_least`, of what is at most (or below) the number."""
    whole, fraction = _digits(number)
    tail = "" if integer else r"(\.[0-9]+)?"
    found = [f"(0|[1-9][0-9]{{0,{len(whole) - 2}}}){tail}"] if len(whole) > 1 else []
    for i, digit in enumerate(whole):
        least = 1 if i == 0 and len(whole) > 1 else 0
        if int(digit) > least:
            found.append(f"{whole[:i]}[{least}-{int(digit) - 1}][0-9]{{{len(whole) - i - 1}}}{tail}")
    if integer:
        return "|".join(found + ([] if below else [whole])) or "[^0-9]"
    start = rf"{whole}\."
    for i, digit in enumerate(fraction):
        if digit > "0":
            found.append(rf"{start}{fraction[:i]}[0-{int(digit) - 1}][0-9]*")
        found.append(rf"{start}{fraction[: i + 1]}" if i + 1 < len(fraction) else whole)
    if not below:
        found.append(rf"{start}{fraction}0*" if fraction else rf"{whole}(\.0+)?")
    return "|".join(found) or "[^0-9]"
