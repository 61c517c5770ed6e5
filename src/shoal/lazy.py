"""The only way to import modules that are heavy or not always installed."""

import importlib
from typing import Any


def load(path: str) -> Any:
    """Import a module now and return one of its names. path: `module:Name`."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
