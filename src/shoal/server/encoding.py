"""JSON as the server writes it."""

import json
from typing import Any

_encoder = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def text_of(value: Any) -> str:
    return _encoder.encode(value)


def bytes_of(value: Any) -> bytes:
    """Half a surrogate pair, which JSON can carry and UTF-8 can't, becomes a question mark."""
    return _encoder.encode(value).encode("utf-8", "replace")
