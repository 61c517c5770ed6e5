"""JSON as the server writes it, and how much of it there is."""

import json
from collections.abc import Mapping
from typing import Any

_encoder = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


# Readers of event streams that split at whatever Unicode calls the end of a line would find half an event.
_LINE_ENDS = str.maketrans({end: f"\\u{ord(end):04x}" for end in "\u0085\u2028\u2029"})


def text_of(value: Any) -> str:
    text = _encoder.encode(value)
    return text if text.isascii() else text.translate(_LINE_ENDS)


def bytes_of(value: Any) -> bytes:
    """Half a surrogate pair, which JSON can carry and UTF-8 can't, becomes a question mark."""
    return text_of(value).encode("utf-8", "replace")


def size_of(value: Any) -> int:
    """About how many characters a value of JSON has."""
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
    return size
