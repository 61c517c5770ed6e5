"""The declaration of one option, and the check of a value that is given for it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from shoal.errors import ConfigError
from shoal.values import closest, decimal_number, parse_bytes, shown, whole_number

T = TypeVar("T")

LARGEST = 2**63 - 1  # the largest integer that every message between processes can carry

_NOT_FINITE = ("nan", "inf", "-inf")
_SWITCH_WORDS = {**dict.fromkeys(("1", "true", "yes", "on"), True), **dict.fromkeys(("0", "false", "no", "off"), False)}
_TYPE_NAMES = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}


def option(
    default: T,
    help: str,
    *,
    short: str | None = None,
    minimum: float | None = None,
    maximum: int = LARGEST,
    bytes_: bool = False,
    parse: Callable[[Any, str], Any] | None = None,
    metavar: str | None = None,
    local: bool = False,
) -> T:
    """Declare an option.

    Args:
        short: a second flag.
        maximum: of an integer.
        bytes_: sizes such as 512MiB and 2GiB are allowed.
        parse: called with the value and the flag, for options with a form of their own.
        local: the processes of one job may have different values.
    """
    found: T = field(
        default=default,
        metadata={
            "help": help,
            "short": short,
            "minimum": minimum,
            "maximum": maximum,
            "bytes": bytes_,
            "parse": parse,
            "metavar": metavar,
            "local": local,
        },
    )
    return found


@dataclass(frozen=True, slots=True)
class Option:
    """The description of an option, as flags, `LLM(...)` and the docs need it."""

    name: str
    group: str
    type: type  # int, float, str or bool; str where `parse` is set
    default: Any
    choices: tuple[str, ...]
    optional: bool
    help: str
    short: str | None
    minimum: float | None
    maximum: int  # of an integer
    bytes: bool
    parse: Callable[[Any, str], Any] | None
    metavar: str | None
    online: bool  # for `shoal serve` and AsyncLLM only

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    def read(self, text: str, name: str) -> Any:
        """Read the value from a text, as environment variables have it.

        Raises:
            ConfigError: the text is not a value of this option; the message calls the option `name`.
        """
        value: Any = text
        if self.type is bool:
            value = _SWITCH_WORDS.get(text.lower(), text)
        elif self.type in (int, float) and not self.bytes:
            value = read_number(text, self.type)
        return self.check(value, name)

    def check(self, value: Any, name: str = "") -> Any:
        """Return the value in the option's type.

        Raises:
            ConfigError: the value has another type or is out of range; the message calls the option `name`, or by its
                flag.
        """
        name = name or self.flag
        if value is None and self.optional:
            return None
        if self.parse is not None:
            return self.parse(value, name)
        if self.bytes and isinstance(value, str):
            value = parse_bytes(value, name)
        wanted = int | float if self.type is float else self.type
        if not isinstance(value, wanted) or (isinstance(value, bool) and self.type is not bool):
            raise ConfigError(f"{name} takes {_TYPE_NAMES[self.type]}, got {shown(value)}")
        if self.choices and value not in self.choices:
            raise ConfigError(f"{name} must be one of {', '.join(self.choices)}, got {shown(value)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name} takes a finite number, got {value}")
        if self.minimum is not None and isinstance(value, int | float) and not value >= self.minimum:
            raise ConfigError(f"{name} must be at least {self.minimum:g}, got {shown(value)}")
        if isinstance(value, int) and abs(value) > self.maximum:  # it may be too large for a float, too
            raise ConfigError(f"{name} must be at most {self.maximum}, got {shown(value)}")
        return float(value) if isinstance(value, int) and self.type is float else value


def read_number(text: str, kind: type) -> Any:
    """Return the number in a text, which may be NaN or infinite; or else the text, which `Option.check` refuses."""
    if kind is float and text.lower() in _NOT_FINITE:
        return float(text)
    number = whole_number(text) if kind is int else decimal_number(text)
    return text if number is None else number


def nearest(name: str, known: Sequence[str]) -> str:
    """Return the end of a message about an unknown name: the closest known one, or all of them."""
    near = closest(name, known)
    return f"; did you mean {near}?" if near else f"; known are {', '.join(known)}"
