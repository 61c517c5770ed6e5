"""Modules that are heavy or not always installed come in through `load`, and through nothing else."""

import importlib
from typing import Any


def load(path: str) -> Any:
    """`module:Name`, imported now."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
