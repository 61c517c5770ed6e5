"""The base of all messages between processes, and how they are encoded: msgpack, versioned as a whole."""

from typing import Any, TypeVar

import msgspec

WIRE_VERSION = 8

Ids = tuple[int, ...]


class Wire(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of all messages: positional fields, tagged by the class name."""


class Stop(Wire, frozen=True):
    pass


_encoder = msgspec.msgpack.Encoder()

W = TypeVar("W", bound=Wire)


def replace_fields(message: W, **changes: Any) -> W:
    """The same message with other values in some fields."""
    return msgspec.structs.replace(message, **changes)


def encode(message: Wire) -> bytes:
    return _encoder.encode(message)


WireError = msgspec.MsgspecError  # what decoding raises
