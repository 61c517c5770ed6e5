"""The forms that the values of parameters have: how each is checked, and how its range reads.

A form's `read` returns a value in the type in which it is kept, or raises a `RequestError` that names the parameter.
`str(form)` describes what is allowed.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from shoal.errors import RequestError
from shoal.values import shown, whole_number

_LARGEST = sys.float_info.max
_TOKEN_IDS = 1 << 31  # no vocabulary is larger


class Form(Protocol):
    """The form of the values of a parameter."""

    def read(self, name: str, value: Any) -> Any:
        """Return a checked value of the parameter `name`.

        Raises:
            RequestError: the value is of the wrong type, or out of its range.
        """


@dataclass(frozen=True, slots=True)
class Number:
    """A number in a range."""

    low: float = -math.inf
    high: float = math.inf
    integer: bool = False
    above_low: bool = False  # True: `low` itself is not allowed
    also: tuple[int, ...] = ()  # allowed values outside of the range, which have meanings of their own
    optional: bool = False  # True: None is allowed
    note: str = ""  # follows the range in descriptions

    def read(self, name: str, value: object, subject: str | None = None) -> float | None:
        """Return a checked value; a number that is not an integer becomes a float, which messages can carry.

        Args:
            subject: the name of the value in errors, if it is a part of the parameter `name`.
        """
        if value is None and self.optional:
            return None
        kind = "an integer" if self.integer else "a finite number"
        wanted = int if self.integer else int | float
        # An integer may be larger than every float, and too long to be shown.
        if isinstance(value, bool) or not isinstance(value, wanted) or not (self.integer or abs(value) <= _LARGEST):
            raise RequestError.about(name, f"must be {kind} {self}, got {shown(value)}", subject=subject)
        is_inside = (value > self.low if self.above_low else value >= self.low) and value <= self.high
        if not is_inside and value not in self.also:
            raise RequestError.about(name, f"must be {self}, got {shown(value)}", subject=subject)
        return value if self.integer else float(value)

    @property
    def least(self) -> float:
        """The smallest allowed value."""
        return min(self.low, *self.also) if self.also else self.low

    def __str__(self) -> str:
        if math.isfinite(self.high):
            text = f"in {'(' if self.above_low else '['}{self.low:g}, {self.high:g}]"
        elif math.isfinite(self.low):
            text = f"above {self.low:g}" if self.above_low else f"at least {self.low:g}"
        else:
            text = "of any size"
        return text + (f", {self.note}" if self.note else "")


@dataclass(frozen=True, slots=True)
class Switch:
    """True or false."""

    def read(self, name: str, value: object) -> bool:
        if not isinstance(value, bool):
            raise RequestError.about(name, f"must be true or false, got {shown(value)}")
        return value

    def __str__(self) -> str:
        return "true or false"


@dataclass(frozen=True, slots=True)
class Texts:
    """A list of texts that are not empty. None is an empty list."""

    single: bool = False  # True: one text stands for a list of it

    def read(self, name: str, value: object, subject: str | None = None) -> tuple[str, ...]:
        """Return each text once, in their order. `subject` is as in `Number.read`."""
        if self.single and isinstance(value, str):
            value = [value]
        for each in _items(name, value, "texts", subject):
            if not isinstance(each, str) or not each:
                why = f"must be a list of texts that are not empty, got {shown(each)}"
                raise RequestError.about(name, why, subject=subject)
        return tuple(dict.fromkeys(_items(name, value, "texts", subject)))

    def __str__(self) -> str:
        return "a text, or a list of texts" if self.single else "a list of texts"


@dataclass(frozen=True, slots=True)
class TokenIds:
    """A list of token ids. None is an empty list."""

    optional: bool = False  # True: None means something else than an empty list, and an empty list is refused

    def read(self, name: str, value: object) -> tuple[int, ...] | None:
        """Return each id once, in their order."""
        if value is None and self.optional:
            return None
        for each in _items(name, value, "token ids"):
            if not is_token_id(each):
                why = f"must be a list of token ids, integers in [0, 2^31), got {shown(each)}"
                raise RequestError.about(name, why)
        if self.optional and not value:
            raise RequestError.about(name, "must hold at least one id, or be None for all")
        return tuple(dict.fromkeys(_items(name, value, "token ids")))

    def __str__(self) -> str:
        return "a list of token ids" + (", or None for all" if self.optional else "")


@dataclass(frozen=True, slots=True)
class Biases:
    """A mapping from token ids to numbers in a range. Keys may be written as texts, as in JSON."""

    numbers: Number

    def read(self, name: str, value: object) -> dict[int, float] | None:
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise RequestError.about(name, f"must map token ids to numbers, got {shown(value)}")
        found: dict[int, float] = {}
        for key, number in value.items():
            token = whole_number(key, canonical=True) if isinstance(key, str) else key
            if not isinstance(token, int) or not is_token_id(token):
                why = f"must map token ids, integers in [0, 2^31), to numbers, got the key {shown(key)}"
                raise RequestError.about(name, why)
            bias = self.numbers.read(name, number, f"{name} of token {token}")
            assert isinstance(bias, float)
            found[token] = bias
        return found

    def __str__(self) -> str:
        return f'token ids, each with a number {self.numbers}, such as {{"50256": -100}}'


@dataclass(frozen=True, slots=True)
class AnyObject:
    """An object of names and values, or None."""

    def read(self, name: str, value: object) -> dict[str, Any] | None:
        if value is None:
            return None
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise RequestError.about(name, f"must be an object of names and values, got {shown(value)}")
        return dict(value)

    def __str__(self) -> str:
        return "an object of names and values"


@dataclass(frozen=True, slots=True)
class UnsupportedParameter:
    """The form of a parameter that other engines have and Shoal does not: only an empty value is allowed."""

    instead: str  # what to use instead

    def read(self, name: str, value: object) -> None:
        if value is not None and not (isinstance(value, list | tuple) and not value):
            raise RequestError.about(name, f"is not supported: {self.instead}")

    def __str__(self) -> str:
        return "not supported"


def is_token_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _TOKEN_IDS


def _items(name: str, value: object, what: str, subject: str | None = None) -> Sequence[Any]:
    if value is None:
        return ()
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise RequestError.about(name, f"must be a list of {what}, got {shown(value)}", subject=subject)
    return value
