"""Reading the JSON of request bodies in small steps, with limits on what it may hold.

`json.loads` reads a body of 30 MB in one call, during which no other thread of Python runs. Here there is one call for
each list or object, for each run of numbers and strings in them, and for each part of a long string; between calls
other threads get their turn. Values are counted while they are read, so that a body with too many is refused before it
takes much memory.
"""

import json
import math
import re
from collections.abc import Callable
from typing import Any

from shoal.errors import RequestError
from shoal.server.http.errors import HttpError
from shoal.values import shown

_SPACE = r"[ \t\n\r]*+"
_PART = 1 << 16  # characters of a string that are looked at in one call
_TEXT = rf'"[^"\\\x00-\x1f]{{0,{_PART}}}+"'  # a string without escapes
_WORD = r"[-+.0-9A-Za-z]++"
_RUN = 4096  # values that are read in one call, at most
_SPAN = 1 << 18  # characters that are read in one call, at most
# A run of values in a list, or of pairs in an object, without lists and objects among them; it ends with a comma.
_VALUES = re.compile(rf"(?:{_SPACE}(?:{_TEXT}|{_WORD}){_SPACE},){{1,{_RUN}}}+", re.DOTALL)
_PAIRS = re.compile(rf"(?:{_SPACE}{_TEXT}{_SPACE}:{_SPACE}(?:{_TEXT}|{_WORD}){_SPACE},){{1,{_RUN}}}+", re.DOTALL)
_BLANK = re.compile(_SPACE)
_NOT_PLAIN = re.compile(r"[\\\x00-\x1f]")
_SHOWN = 40  # characters of a wrong number that an error shows


def _no_number(text: str) -> Any:
    why = f"the body has the number {shown(text[:_SHOWN])}, which is not valid JSON or does not fit a 64-bit float"
    raise RequestError(why, code="invalid_json")


def _finite(text: str) -> float:
    """Return a number. Python would read 1e999 as infinity, which JSON can't express in an answer and range checks may
    miss."""
    number = float(text)
    return number if math.isfinite(number) else _no_number(text)


_decoder = json.JSONDecoder(parse_float=_finite, parse_constant=_no_number)


class JsonReader:
    """Reads one JSON text. `most_values`, `most_containers` (lists and objects) and `most_depth` limit what it may
    hold."""

    def __init__(self, text: str, *, most_values: int, most_containers: int, most_depth: int) -> None:
        self._text = text
        self._most_values = most_values
        self._most_containers = most_containers
        self._most_depth = most_depth
        self._values = 0
        self._containers = 0
        self._depth = 0

    def read(self) -> Any:
        """Return the value.

        Raises:
            json.JSONDecodeError: the text is not JSON.
            HttpError: it holds more than it may, or a number that is not valid JSON or does not fit a 64-bit float.
        """
        value, at = self._value(self._skip(0))
        at = self._skip(at)
        if at != len(self._text):
            raise json.JSONDecodeError("Extra data", self._text, at)
        return value

    def _skip(self, at: int) -> int:
        found = _BLANK.match(self._text, at)
        return at if found is None else found.end()

    def _value(self, at: int) -> tuple[Any, int]:
        first = self._text[at : at + 1]
        if first == "[":
            return self._inside(at, self._list)
        if first == "{":
            return self._inside(at, self._object)
        self._count(1)
        if first == '"' and (end := self._end_of_plain(at)) is not None:
            return self._text[at + 1 : end], end + 1
        return _decode(self._text, at)

    def _end_of_plain(self, at: int) -> int | None:
        """Return where a long string ends; None if it is short or has escapes."""
        end = self._text.find('"', at + 1)
        if end - at <= _PART:
            return None
        parts = range(at + 1, end, _PART)
        if any(_NOT_PLAIN.search(self._text, part, min(part + _PART, end)) for part in parts):
            return None
        return end

    def _inside(self, at: int, read: Callable[[int], tuple[Any, int]]) -> tuple[Any, int]:
        self._count(1)
        self._containers += 1
        if self._containers > self._most_containers:
            raise HttpError(
                413, f"the body has more than {self._most_containers} lists and objects: send fewer prompts"
            )
        self._depth += 1
        if self._depth > self._most_depth:
            raise RequestError(f"the body is nested deeper than {self._most_depth} levels", code="invalid_json")
        found = read(at + 1)
        self._depth -= 1
        return found

    def _count(self, values: int) -> None:
        self._values += values
        if self._values > self._most_values:
            raise HttpError(413, f"the body has more than {self._most_values} values: send fewer or shorter prompts")

    def _list(self, at: int) -> tuple[list[Any], int]:
        found: list[Any] = []
        at = self._skip(at)
        if self._text.startswith("]", at):
            return found, at + 1
        while True:
            if (run := _VALUES.match(self._text, at, at + _SPAN)) is not None:
                values = self._run(f"[{run[0][:-1]}]", at)
                self._count(len(values))
                found += values
                at = self._skip(run.end())
            value, at = self._value(at)
            found.append(value)
            at, more = self._next(at, "]")
            if not more:
                return found, at

    def _object(self, at: int) -> tuple[dict[str, Any], int]:
        found: dict[str, Any] = {}
        at = self._skip(at)
        if self._text.startswith("}", at):
            return found, at + 1
        while True:
            if (run := _PAIRS.match(self._text, at, at + _SPAN)) is not None:
                pairs = self._run(f"{{{run[0][:-1]}}}", at)
                self._count(len(pairs))
                found.update(pairs)
                at = self._skip(run.end())
            if not self._text.startswith('"', at):
                raise json.JSONDecodeError("Expecting property name enclosed in double quotes", self._text, at)
            key, at = _decode(self._text, at)
            at = self._skip(at)
            if not self._text.startswith(":", at):
                raise json.JSONDecodeError("Expecting ':' delimiter", self._text, at)
            found[key], at = self._value(self._skip(at + 1))
            at, more = self._next(at, "}")
            if not more:
                return found, at

    def _run(self, text: str, at: int) -> Any:
        """Decode `text`, which is the part of the whole text from `at` on, put in brackets. Errors name the place in
        the whole text."""
        try:
            return _decode(text, 0)[0]
        except json.JSONDecodeError as error:
            raise json.JSONDecodeError(error.msg, self._text, at + error.pos - 1) from None

    def _next(self, at: int, end: str) -> tuple[int, bool]:
        """Look at what follows a value: return where the next value begins and True, or where the container ends and
        False."""
        at = self._skip(at)
        if self._text.startswith(end, at):
            return at + 1, False
        if not self._text.startswith(",", at):
            raise json.JSONDecodeError("Expecting ',' delimiter", self._text, at)
        return self._skip(at + 1), True


def _decode(text: str, at: int) -> tuple[Any, int]:
    """Return the value that begins at `at`, and where it ends."""
    try:
        return _decoder.raw_decode(text, at)
    except (json.JSONDecodeError, RequestError):
        raise
    except ValueError:
        raise RequestError("the body has a number of too many digits", code="invalid_json") from None


def may_have_halves(text: str) -> bool:
    """True if an escape in the text may be half of a surrogate pair."""
    return "\\ud" in text or "\\uD" in text


def refuse_halves(value: Any) -> None:
    """Check that no string in a value has half of a surrogate pair.

    Raises:
        HttpError: one has; it names the place.
    """
    pending: list[tuple[str, Any]] = [("", value)]
    while pending:
        where, each = pending.pop()
        if isinstance(each, str) and (at := _half(each)) is not None:
            half = f"\\u{ord(each[at]):04x} at character {at}"
            why = (
                f"{where or 'the body'} is not valid Unicode: {half} is half of a surrogate pair without the other half"
            )
            raise RequestError(why, where or None)
        if isinstance(each, dict):
            if any(_half(key) is not None for key in each):
                raise RequestError(f"{where or 'the body'} has a name that is not valid Unicode", where or None)
            pending.extend((f"{where}.{key}" if where else key, inner) for key, inner in reversed(each.items()))
        elif isinstance(each, list):
            pending.extend((f"{where}[{i}]", inner) for i, inner in reversed(list(enumerate(each))))


def _half(text: str) -> int | None:
    """Return the position of a lone surrogate; None if there is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None
