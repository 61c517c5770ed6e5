"""The garbage collector in processes of this project.

The objects that a process has after its start, several hundred thousand with PyTorch or a web framework, exist until
its end. A full collection examines all of them, which stops every thread for 50 to 200 ms.
"""

import atexit
import gc

_AT_START = 50_000  # new objects until the next collection while a program starts; Python's own count is 700
_RUNNING = gc.get_threshold()


def collect_rarely() -> None:
    """Collect some 70 times less often until the next `freeze`: a program that imports PyTorch starts 0.1 s sooner.

    A process of this project calls this at its start. Library functions do not: the collector is up to the caller.
    """
    gc.set_threshold(_AT_START, *_RUNNING[1:])


def freeze() -> None:
    """Exclude all objects that exist now from later collections, except garbage, which is collected.

    A process of this project calls this after its start.
    """
    gc.collect()
    freeze_imports()


def freeze_imports() -> None:
    """Exclude all objects that exist now from later collections, garbage too.

    For a process that has only imported modules: a search for garbage would take 0.1 s, and find next to nothing.
    """
    gc.freeze()
    gc.set_threshold(*_RUNNING)


def end_without_collections() -> None:
    """Let the interpreter end without a search for garbage, which takes 0.4 s in a process that has loaded PyTorch."""
    atexit.register(gc.freeze)


def collect() -> None:
    """Run a full collection that includes frozen objects, and freeze again if any were frozen."""
    frozen = gc.get_freeze_count() > 0
    gc.unfreeze()
    gc.collect()
    if frozen:
        gc.freeze()
