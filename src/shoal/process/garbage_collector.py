"""The garbage collector in processes of this project.

The objects that a process has after its start, several hundred thousand with PyTorch or a web framework, exist until
its end. A full collection examines all of them, which stops every thread for 50 to 200 ms.
"""

import gc


def freeze() -> None:
    """Exclude all objects that exist now from later collections.

    A process of this project calls this after its start. Library functions do not: the collector is up to the caller.
    """
    gc.collect()
    gc.freeze()


def collect() -> None:
    """Run a full collection that includes frozen objects, and freeze again if any were frozen."""
    frozen = gc.get_freeze_count() > 0
    gc.unfreeze()
    gc.collect()
    if frozen:
        gc.freeze()
