"""Processes, as tests see them."""

from pathlib import Path


def children(parent: int) -> list[int]:
    """The processes that `parent` has started, by any of its threads."""
    found = []
    for tasks in Path(f"/proc/{parent}/task").glob("*/children"):
        try:
            found += [int(pid) for pid in tasks.read_text().split()]
        except OSError:  # the thread has ended
            continue
    return found
