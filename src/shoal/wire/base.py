"""The base of all messages between processes, and how they are encoded: msgpack, versioned as a whole."""

from typing import Any, TypeVar

import msgspec

WIRE_VERSION = 7

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


def as_json(message: Wire) -> dict[str, Any]:
    """Return a message as objects of JSON, whose keys are the names of the fields."""
    return {name: _plain(getattr(message, name)) for name in message.__struct_fields__}


def _plain(value: Any) -> Any:
    if isinstance(value, Wire):
        return as_json(value)
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return msgspec.to_builtins(value)


WireError = msgspec.MsgspecError  # what decoding raises
