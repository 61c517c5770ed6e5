"""The base class of all messages between processes, and their encoding: msgpack.

All messages have one version, `WIRE_VERSION`, which is raised with every change of any message. Processes with
different versions refuse to work together.
"""

from typing import Any, TypeVar

import msgspec

WIRE_VERSION = 20

Ids = tuple[int, ...]


class Wire(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The base class of all messages. Fields are encoded by position, and the class name is the tag."""


class Stop(Wire, frozen=True):
    """A request to the receiving process to end."""


_encoder = msgspec.msgpack.Encoder()

W = TypeVar("W", bound=Wire)


def replace_fields(message: W, **changes: Any) -> W:
    """Return a copy of a message with some fields changed."""
    return msgspec.structs.replace(message, **changes)


def encode(message: Wire) -> bytes:
    return _encoder.encode(message)


def as_json(message: Wire) -> dict[str, Any]:
    """Return a message as JSON objects whose keys are the names of the fields."""
    return {name: _plain(getattr(message, name)) for name in message.__struct_fields__}


def _plain(value: Any) -> Any:
    if isinstance(value, Wire):
        return as_json(value)
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return msgspec.to_builtins(value)


WireError = msgspec.MsgspecError  # the error that decoders raise
