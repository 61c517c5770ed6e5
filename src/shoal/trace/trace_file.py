"""A trace file: events of the Chrome trace event format, as JSON, which is valid however the process ends.

The format is Google's "Trace Event Format" (JSON object format); Perfetto and chrome://tracing read it.
"""

import gzip
import json
import os
import stat
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from shoal.errors import ConfigError

_HEAD = b'{"displayTimeUnit":"ns","traceEvents":['
_LEVEL = 3  # of gzip: a tenth of the size, at a fifth of the time of the highest level


class TraceFile:
    """A file to which events are appended.

    At any time the file is complete: its end is written with the events, and overwritten by the next ones in one write
    that leaves nothing of it. With gzip each call writes members of their own, which a reader sees as one file.
    """

    def __init__(self, path: Path) -> None:
        """Begin a new file.

        Raises:
            ConfigError: the file cannot be written, or has something else than a trace in it.
        """
        self.path = path
        self.events = 0
        self._packed = path.suffix == ".gz"
        self._file = _open(path)
        self._end = 0  # where the end of the document begins
        self._size = 0  # of the file
        self._file.truncate(0)
        self._write(_HEAD, {})

    def append(self, events: Iterable[str], facts: Mapping[str, Any]) -> None:
        """Append events, each as JSON. `facts` are about the whole trace, and replace earlier ones.

        Raises:
            OSError: the disk is full, or has failed.
        """
        lines = list(events)
        separator = "\n" if not self.events else ",\n"
        self.events += len(lines)
        self._write((separator + ",\n".join(lines)).encode() if lines else b"", facts)

    def _write(self, part: bytes, facts: Mapping[str, Any]) -> None:
        end = b'\n],"otherData":' + json.dumps(facts).encode() + b"}\n"
        packed = self._pack(part, _LEVEL)
        excess = self._size - self._end - len(packed) - len(self._pack(end, 0))
        data = packed + self._pack(end + b" " * max(excess, 0), 0)  # so the file never becomes shorter
        written = 0
        while written < len(data):
            written += os.pwrite(self._file.fileno(), data[written:], self._end + written)
        self._size = self._end + len(data)
        self._end += len(packed)

    def _pack(self, part: bytes, level: int) -> bytes:
        return gzip.compress(part, level) if self._packed and part else part

    def close(self) -> None:
        self._file.close()


def check_writable(path: Path) -> None:
    """Check that a trace can be written to a file, and leave everything as it is.

    Raises:
        ConfigError: it cannot, or the file has something else than a trace in it.
    """
    new = not path.exists()
    _open(path).close()
    if new:
        path.unlink(missing_ok=True)


def _open(path: Path) -> Any:
    """Open a file for reading and writing, and keep what is in it.

    Raises:
        ConfigError: it cannot be written, or has something else than a trace in it.
    """
    try:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+b")
    except OSError as error:
        raise ConfigError(f"--trace {path} cannot be written: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ConfigError(f"--trace {path} is no regular file: give the name of a file")
    if not _replaceable(file, packed=path.suffix == ".gz"):
        file.close()
        raise ConfigError(f"--trace {path} exists and is no trace: give another name, or remove the file")
    return file


def _replaceable(file: Any, *, packed: bool) -> bool:
    """Return whether a file is empty or a trace."""
    begin: bytes = file.read(1 << 10)
    if packed and begin:
        try:
            begin = zlib.decompressobj(wbits=31).decompress(begin)
        except zlib.error:
            return False
    return not begin or begin.startswith(_HEAD)
