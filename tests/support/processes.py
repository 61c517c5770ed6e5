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


def descendants(parent: int) -> list[int]:
    """The processes that `parent` and its descendants have started."""
    found = children(parent)
    return found + [pid for child in found for pid in descendants(child)]


def is_running(pid: int) -> bool:
    """Tell whether a process has not ended yet. One that has ended, but that its parent has not waited for, has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except OSError:
        return False
