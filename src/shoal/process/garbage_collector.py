"""The garbage collector, in processes of this project.

What a process has once it runs lives as long as it does: with PyTorch or a web framework these are some hundred
thousand objects. A full collection looks through all of them, which holds up every thread for 50 to 200 ms.
"""

import gc


def settle() -> None:
    """Leaves what there is now out of later collections. For a process of this project that has just started: a
    library call leaves the collector to its caller."""
    gc.collect()
    gc.freeze()


def collect() -> None:
    """Looks through everything for what nothing refers to any more, what was settled included."""
    settled = gc.get_freeze_count() > 0
    gc.unfreeze()
    gc.collect()
    if settled:
        gc.freeze()
