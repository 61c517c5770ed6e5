"""The file of --output. Each line is a JSON object, written completely as soon as it is known."""

import contextlib
import fcntl
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shoal.errors import ShoalError, UserError


class OutputFailed(ShoalError):
    """A line could not be written, most often because the disk is full. The lines before it are complete."""


class OutputFile:
    """A file to which lines are appended. Its contents are unchanged until `start`."""

    def __init__(self, path: str | Path) -> None:
        """Open and lock the file. `-` is stdout, which is never truncated or locked, even if it is a file.

        Raises:
            UserError: it can't be opened, or another run writes to it.
        """
        self.path = Path(path)
        self._stdout = str(path) == "-"  # tested before Path turns `./-`, which is a file, into `-`
        self._fd = self._open()
        self._size = 0
        self.regular = not self._stdout and stat.S_ISREG(os.fstat(self._fd).st_mode)
        if self.regular:
            self._lock()

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def empty(self) -> bool:
        return not self.regular or os.fstat(self._fd).st_size == 0

    def start(self, keep: int = 0) -> None:
        """Truncate the file to its first `keep` bytes; lines are written after them."""
        self._size = keep
        if self.regular:
            with self._convert_errors(UserError):
                os.ftruncate(self._fd, keep)

    def lines(self) -> Iterator[bytes]:
        """Yield the lines of the file. The last one may be incomplete."""
        with self._convert_errors(UserError), self.path.open("rb") as file:
            yield from file

    def replace(self, lines: Iterator[bytes]) -> int:
        """Replace the contents of the file, all or nothing. Return the number of bytes.

        Raises:
            UserError: the new contents can't be written; the file is unchanged.
        """
        with self._convert_errors(UserError):
            target = self.path.resolve()
            temporary = target.with_name(f".{target.name}.{os.getpid()}")
            try:
                with temporary.open("xb") as file:
                    file.writelines(lines)
                    size = file.tell()
                temporary.chmod(stat.S_IMODE(os.fstat(self._fd).st_mode))
                temporary.replace(target)
            finally:
                with contextlib.suppress(OSError):
                    temporary.unlink()
        os.close(self._fd)
        self._fd = self._open()
        self._lock()
        return size

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line.

        Raises:
            OutputFailed: the line can't be written, for example because the disk is full; no part of it is left.
        """
        # Only half of a surrogate pair can't be encoded in UTF-8; `backslashreplace` writes it as JSON escapes it.
        data = (json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        with self._convert_errors(OutputFailed):
            try:
                written = 0
                while written < len(data):
                    written += os.write(self._fd, data[written:])
            except BrokenPipeError:
                raise
            except OSError:
                if self.regular:
                    with contextlib.suppress(OSError):
                        os.ftruncate(self._fd, self._size)
                raise
        self._size += len(data)

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            with self._convert_errors(OutputFailed):
                os.close(fd)

    def __enter__(self) -> "OutputFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> int:
        with self._convert_errors(UserError):
            if self._stdout:
                return os.dup(1)
            return os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)

    def _lock(self) -> None:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"--output {self.name} is being written by another run") from None

    @contextmanager
    def _convert_errors(self, kind: type[ShoalError]) -> Iterator[None]:
        """Raise errors of the operating system inside as errors of `kind` that name the file."""
        try:
            yield
        except BrokenPipeError:  # the reader of stdout is gone; the command handles it
            raise
        except OSError as error:
            raise kind(f"--output {self.path} can't be written: {error.strerror}") from None
