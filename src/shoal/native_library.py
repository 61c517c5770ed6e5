"""Finds and opens the libraries that `setup.py` builds from `csrc/`. Their callers have imported torch before."""

import ctypes
from collections.abc import Callable, Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any


def open_library(folder: Path, name: str, version_function: str, version: int) -> tuple[ctypes.CDLL | None, str]:
    """Return the library, or None, and one line that names the opened file or says why there is none."""
    candidates = [folder / f"{name}{suffix}" for suffix in EXTENSION_SUFFIXES]
    path = next((path for path in candidates if path.exists()), None)
    if path is None:
        return None, f"{name} is not built"
    try:
        library = _open(path)
        found = int(library[version_function]())
    except (OSError, AttributeError) as error:
        return None, f"{path.name} cannot be loaded: {error}"
    if found != version:
        return None, f"{path.name} is stale: its interface is version {found}, but {version} is needed; build it again"
    return library, f"{path.name}"


def bind(
    library: ctypes.CDLL,
    name: str,
    arguments: Sequence[Any],
    result: type[ctypes.c_int32 | ctypes.c_int64] | None = None,
) -> Callable[..., Any]:
    """Return a function of a library that takes these types of ctypes, and returns nothing or a number."""
    function = library[name]
    function.argtypes, function.restype = list(arguments), result
    return function


def _open(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        # The library is not linked to an OpenMP runtime but uses the one in the process. Usually the symbols of
        # PyTorch's runtime are visible to libraries that are loaded later; if not, opening it again makes them visible.
        runtime = _loaded_openmp()
        if runtime is None:
            raise
        ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(path))


def _loaded_openmp() -> str | None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    mapped = (line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines())
    return next((name for name in mapped if Path(name).name.startswith(("libgomp", "libiomp5", "libomp"))), None)
