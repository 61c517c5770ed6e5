"""Where traces are written: the option --trace."""

import secrets
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from shoal.trace.trace_file import check_writable


@dataclass(frozen=True, slots=True)
class TraceTarget:
    """The files of the traces of one program.

    With the name of a file, a trace is recorded from the start on; traces that are started later get numbers. With a
    folder, or without the option, traces are recorded only when they are asked for, and named after the time. Without
    the option they are in the system's folder for temporary files.
    """

    file: Path | None
    folder: Path

    @classmethod
    def of(cls, given: str | None, replica: int | None = None) -> "TraceTarget":
        """Return the target that a user has given.

        Args:
            replica: the number of this process among replicas that were started one by one, perhaps with the same
                option; it becomes part of the name.
        """
        if given is None:
            return cls(None, Path(tempfile.gettempdir()))
        path = Path(given)
        if path.is_dir():
            return cls(None, path)
        if replica is not None:
            path = _with_suffix(path, f"replica-{replica}")
        return cls(path, path.parent)

    def check(self) -> None:
        """Check that traces can be written there.

        Raises:
            ConfigError: they cannot, or the file has something else than a trace in it.
        """
        check_writable(self.file or self.folder / _file_name())

    def path(self, count: int) -> Path:
        """Return the file of the next trace. `count`: how many there were before."""
        if self.file is None:
            return self.folder / _file_name()
        return self.file if not count else _with_suffix(self.file, str(count))


def _file_name() -> str:
    return f"shoal-trace-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}.json.gz"


def _with_suffix(path: Path, text: str) -> Path:
    """Return the path with a text before the suffixes of its name: trace.json.gz -> trace-1.json.gz."""
    stem, dot, suffixes = path.name.partition(".")
    return path.with_name(f"{stem}-{text}{dot}{suffixes}")
