"""The library of `csrc/shared_memory.cpp`, through ctypes."""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from shoal.errors import CommError
from shoal.native_call import WordsFunction
from shoal.native_library import open_library

VERSION = 3

_INT, _LONG, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "bytes": (_LONG, [_INT]),
    "map": (_LONG, [_INT, _INT]),
    "unmap": (None, [_POINTER, _INT]),
    "max_ranks": (_INT, []),
    "sums": (_INT, [_INT]),
    "prepare": (None, [_POINTER, _INT, ctypes.c_uint64]),
    "attach": (_POINTER, [_POINTER, _INT, _INT, ctypes.c_uint64, _POINTER, _LONG, _LONG, _LONG]),
    "detach": (None, [_POINTER]),
    "abort": (None, [_POINTER, _INT]),
    "position": (ctypes.c_uint64, [_POINTER, _INT]),
    "totals": (None, [_POINTER, _INT, _POINTER]),
    "all_reduce": (_INT, [_POINTER, _INT, _POINTER, _POINTER, _LONG, _LONG]),
    "all_gather": (_INT, [_POINTER, _POINTER, _POINTER, _POINTER, _LONG]),
    "reduce_scatter": (_INT, [_POINTER, _INT, _POINTER, _POINTER, _POINTER, _LONG]),
    "all_to_all": (_INT, [*[_POINTER] * 5, _LONG]),
    "broadcast": (_INT, [_POINTER, _POINTER, _LONG, _INT, _LONG]),
    "barrier": (_INT, [_POINTER]),
    "send": (_INT, [_POINTER, _POINTER, _LONG, _INT, _LONG]),
    "receive": (_INT, [_POINTER, _POINTER, _LONG, _INT]),
}


class Library:
    """The functions of the library. `recorded_all_reduce` is the form of `all_reduce` that recorded steps call."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, (result, arguments) in _SIGNATURES.items():
            function = library[f"shoal_shared_memory_{name}"]
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        name = "shoal_shared_memory_all_reduce"
        self.recorded_all_reduce = WordsFunction(library, name, _SIGNATURES["all_reduce"][1])

    def __getattr__(self, name: str) -> Callable[..., Any]:  # only for types: all functions are attributes
        raise AttributeError(name)


@cache
def load_library() -> tuple[Library | None, str]:
    """Return the library, or None, and one line that names it or says why there is none."""
    library, reason = open_library(Path(__file__).parent, "_shared_memory", "shoal_shared_memory_version", VERSION)
    return (None if library is None else Library(library)), reason


def loaded_library() -> Library:
    """Return the library.

    Raises:
        CommError: there is none.
    """
    library, reason = load_library()
    if library is None:
        raise CommError(f"shared memory cannot be used: {reason}")
    return library
