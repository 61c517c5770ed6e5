"""The file of --output: a JSON object a line, each written as a whole as soon as it is there."""

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
    """A line could not be written, most often because the disk is full. The lines before it are whole."""


class OutputFile:
    """Lines are appended, and nothing that is there is touched before `start`. `-` is stdout: even where that is a
    file it is another's, and so never cut or locked.

    Raises:
        UserError: it can't be opened, or another run writes it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._stdout = str(path) == "-"  # `./-`, which Path makes the same, is a file
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
        """Begins behind the first `keep` bytes; the rest is cut off."""
        self._size = keep
        if self.regular:
            with self._named(UserError):
                os.ftruncate(self._fd, keep)

    def lines(self) -> Iterator[bytes]:
        """What the file holds, line by line, the last one perhaps cut."""
        with self._named(UserError), self.path.open("rb") as file:
            yield from file

    def replace(self, lines: Iterator[bytes]) -> int:
        """Puts other contents in the file's place, all or nothing. Gives the bytes.

        Raises:
            UserError: it can't be written; the file is as it was.
        """
        with self._named(UserError):
            target = self.path.resolve()
            beside = target.with_name(f".{target.name}.{os.getpid()}")
            try:
                with beside.open("xb") as file:
                    file.writelines(lines)
                    size = file.tell()
                beside.chmod(stat.S_IMODE(os.fstat(self._fd).st_mode))
                beside.replace(target)
            finally:
                with contextlib.suppress(OSError):
                    beside.unlink()
        os.close(self._fd)
        self._fd = self._open()
        self._lock()
        return size

    def write(self, line: Mapping[str, Any]) -> None:
        """
        Raises:
            OutputFailed: the disk is full, or the like; what was written of this line is taken back.
        """
        # The one thing that UTF-8 can't hold is half of a surrogate pair; JSON has an escape for it, the same.
        data = (json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        with self._named(OutputFailed):
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
            with self._named(OutputFailed):
                os.close(fd)

    def __enter__(self) -> "OutputFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> int:
        with self._named(UserError):
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
    def _named(self, kind: type[ShoalError]) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:  # whoever read it has gone
            raise
        except OSError as error:
            raise kind(f"--output {self.path} can't be written: {error.strerror}") from None
