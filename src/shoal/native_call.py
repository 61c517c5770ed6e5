"""Calls of C++ functions that are kept, to be made again without Python: see `csrc/replay.h`."""

import ctypes
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_FORMATS: dict[Any, str] = {ctypes.c_int32: "q", ctypes.c_int64: "q", ctypes.c_void_p: "Q", ctypes.c_float: "f4x"}


@dataclass(frozen=True, slots=True)
class NativeCall:
    """A call of a C++ function with its arguments, and the memory that they point to if nobody else keeps it."""

    address: int  # of the function, which returns a status: 0 unless it failed
    words: bytes  # the arguments, 64 bits each
    error: Callable[[int], Exception]  # what another status means
    kept: tuple[object, ...] = ()


class WordsFunction:
    """The second form of a function of a library, with `_words` behind its name, that takes the arguments as words."""

    def __init__(self, library: ctypes.CDLL, name: str, arguments: Sequence[Any]) -> None:
        """arguments: their types of ctypes."""
        self._address = ctypes.cast(library[f"{name}_words"], ctypes.c_void_p).value or 0
        self._words = struct.Struct("<" + "".join(_FORMATS[kind] for kind in arguments))

    def call(self, arguments: Sequence[Any], error: Callable[[int], Exception]) -> NativeCall:
        """Return a call with these arguments. `error`: makes an exception of a status."""
        kept = tuple(argument for argument in arguments if isinstance(argument, ctypes.Array))
        return NativeCall(self._address, self._words.pack(*map(_number, arguments)), error, kept)


def _number(argument: Any) -> Any:
    if argument is None:
        return 0
    return ctypes.addressof(argument) if isinstance(argument, ctypes.Array) else argument
