"""Files as they were when they were read: whether they are the same now is told by inode, size and time."""

from collections.abc import Iterable, Mapping
from pathlib import Path

State = tuple[int, int, int, int]


def states(files: Iterable[Path]) -> dict[Path, State]:
    """Of each file its device, inode, size and the time of its last change, in nanoseconds.

    Raises:
        OSError: one is not there.
    """
    return {file: _state(file) for file in files}


def changed(before: Mapping[Path, State]) -> str:
    """Which file is not what it was, and how; "" if all are."""
    for file, state in before.items():
        try:
            now = _state(file)
        except OSError as error:
            return f"{file} is gone ({error.strerror})"
        if now != state:
            what = f"{state[2]} bytes then, {now[2]} now" if now[2] != state[2] else "another file or another time"
            return f"{file} is not what was loaded at the start ({what})"
    return ""


def _state(file: Path) -> State:
    found = file.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
