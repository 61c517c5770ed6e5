"""A store of torch.distributed in a file without a name, by which the processes of one host find each other."""

import datetime
import fcntl
import os
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.distributed

from shoal.errors import CommTimeout

_HEAD = struct.Struct("<II")  # the lengths of a key and of its value, which follow
_POLL_S = 0.001
_DELETED = b"\0deleted"


class SharedFileStore(torch.distributed.Store):  # type: ignore[name-defined,misc]  # it has no usable types
    """A store in a file that all processes have inherited as file descriptor `fd`.

    The file is a list of records, which only grows. A process that dies while it writes may leave half a record at the
    end; whoever writes next removes it. A process opens the file through its own entry in /proc: the entry of the
    process that made the file is closed to others when that process has changed its user id.
    """

    def __init__(self, fd: int, *, timeout_s: float) -> None:
        super().__init__()
        self._file = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        self._timeout_s = timeout_s
        self._values: dict[str, bytes] = {}
        self._known = 0  # bytes of the file that are in `_values`
        self._lock = threading.Lock()
        self._closed = False

    def close(self) -> None:
        """End the waits of all threads for values. Idempotent."""
        self._closed = True

    def __del__(self) -> None:
        os.close(self._file)

    def set(self, key: str, value: str | bytes) -> None:
        with self._locked():
            self._write(key, _bytes(value))

    def compare_set(self, key: str, expected_value: str | bytes, desired_value: str | bytes) -> bytes:
        expected = _bytes(expected_value)
        with self._locked():
            found = self._values.get(key)
            if found == expected or (found is None and not expected):
                self._write(key, _bytes(desired_value))
                return _bytes(desired_value)
        return expected if found is None else found

    def get(self, key: str) -> bytes:
        self.wait([key])
        with self._locked():
            return self._values[key]

    def add(self, key: str, amount: int) -> int:
        with self._locked():
            number = int(self._values.get(key, b"0")) + amount
            self._write(key, b"%d" % number)
            return number

    def check(self, keys: Sequence[str]) -> bool:
        with self._locked():
            return all(key in self._values for key in keys)

    def wait(self, keys: Sequence[str], timeout: datetime.timedelta | None = None) -> None:
        """Wait until all keys have values.

        Raises:
            CommTimeout: a key has no value in time, or before the store is closed.
        """
        seconds = self._timeout_s if timeout is None else timeout.total_seconds()
        deadline = time.monotonic() + seconds
        while not self.check(keys):
            if self._closed or time.monotonic() > deadline:
                raise CommTimeout(f"the store has no value of {', '.join(keys)} after {seconds:g} s")
            time.sleep(_POLL_S)

    def delete_key(self, key: str) -> bool:
        with self._locked():
            if key not in self._values:
                return False
            self._write(key, _DELETED)
            return True

    def set_timeout(self, timeout: datetime.timedelta) -> None:
        self._timeout_s = timeout.total_seconds()

    def has_extended_api(self) -> bool:
        return False

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other threads and processes out, and read what they have written. The kernel unlocks for the dead."""
        with self._lock:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                self._read()
                yield
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def _read(self) -> None:
        size = os.fstat(self._file).st_size
        if size <= self._known:
            return
        data = os.pread(self._file, size - self._known, self._known)
        start = 0
        while len(data) - start >= _HEAD.size:
            key_length, value_length = _HEAD.unpack_from(data, start)
            middle = start + _HEAD.size + key_length
            stop = middle + value_length
            if stop > len(data):
                break
            self._note(data[start + _HEAD.size : middle].decode(), data[middle:stop])
            start = stop
        self._known += start

    def _write(self, key: str, value: bytes) -> None:
        name = key.encode()
        record = _HEAD.pack(len(name), len(value)) + name + value
        os.ftruncate(self._file, self._known)  # removes half a record of a process that has died
        os.pwrite(self._file, record, self._known)
        self._known += len(record)
        self._note(key, value)

    def _note(self, key: str, value: bytes) -> None:
        if value == _DELETED:
            self._values.pop(key, None)
        else:
            self._values[key] = value


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)
