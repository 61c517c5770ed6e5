"""Writing JSON: compact, in small steps, and without characters that break event streams."""

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

_encoder = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


# Some readers of event streams split at every line end that Unicode knows, and would find half an event.
_LINE_ENDS = str.maketrans({end: f"\\u{ord(end):04x}" for end in "\u0085\u2028\u2029"})


def json_text(value: Any) -> str:
    """Return a value as JSON in one line."""
    text = _encoder.encode(value)
    return text if text.isascii() else text.translate(_LINE_ENDS)


def json_bytes(value: Any) -> bytes:
    """Return a value as JSON in UTF-8. Half a surrogate pair, which UTF-8 can't hold, becomes a question mark."""
    return b"".join(piece.encode("utf-8", "replace") for piece in json_pieces(value))


class EncodedList:
    """A JSON list whose items are encoded when they are appended.

    `json_pieces` and `json_bytes` accept it as a value.
    """

    def __init__(self) -> None:
        self._items: list[str] = []

    def append(self, item: Any, /) -> None:
        self._items.append(json_text(item))

    def __len__(self) -> int:
        return len(self._items)

    def __iadd__(self, other: "EncodedList") -> "EncodedList":
        self._items += other._items
        return self

    @property
    def size(self) -> int:
        """The number of characters of all items."""
        return sum(map(len, self._items))

    def pieces(self) -> Iterator[str]:
        """Yield the text of the list in parts."""
        rest = iter(self._items)
        before = "["
        while part := list(islice(rest, _ITEMS)):
            yield before + ",".join(part)
            before = ","
        yield "]" if self._items else "[]"


_ITEMS = 64  # items of an EncodedList that are joined at a time
_PIECE = 2000  # cost of a piece: a value counts 1, ten characters of text count 1


def json_pieces(value: Any) -> Iterator[str]:
    """Yield the text of `json_text` in parts.

    Each part takes about a millisecond, in which no other thread of Python runs.
    """
    if _is_small(value):
        yield json_text(value)
    elif isinstance(value, dict):
        for i, (key, each) in enumerate(value.items()):
            yield f"{',' if i else '{'}{json_text(key)}:"
            yield from json_pieces(each)
        yield "}"
    elif isinstance(value, list | tuple):
        rest = iter(value)
        before = "["
        while part := list(islice(rest, _PIECE // 4)):
            for each in [part] if _is_small(part) else [[one] for one in part]:
                yield before
                yield from _inside(each)
                before = ","
        yield "]"
    elif isinstance(value, EncodedList):
        yield from value.pieces()
    else:
        yield json_text(value)


def _inside(part: list[Any]) -> Iterator[str]:
    """Yield the text of a list without its brackets."""
    if _is_small(part) or len(part) > 1:
        yield json_text(part)[1:-1]
    else:
        yield from json_pieces(part[0])


def _is_small(value: Any) -> bool:
    pending, left = [value], _PIECE
    while pending and left > 0:
        each = pending.pop()
        left -= 1
        if isinstance(each, str):
            left -= len(each) // 10
        elif isinstance(each, dict):
            left -= len(each)
            pending.extend(each.values() if left > 0 else ())
        elif isinstance(each, list | tuple):
            pending.extend(each if len(each) < left else ())
            left -= len(each)
        elif isinstance(each, EncodedList):
            return False
    return left > 0


def text_length(value: Any) -> int:
    """Return about how many characters the JSON of a value has."""
    pending, size = [value], 0
    while pending:
        each = pending.pop()
        if isinstance(each, str):
            size += len(each)
        elif isinstance(each, Mapping):
            pending.extend(each.values())
        elif isinstance(each, list):
            size += len(each)
            pending.extend(each)
        elif isinstance(each, EncodedList):
            size += each.size
    return size
