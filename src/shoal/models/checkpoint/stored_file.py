"""Reads files of a model, and notices if a file was changed after its header was read. Free of torch."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from shoal.errors import CheckpointError

_MAX_READ_BYTES = 1 << 30  # of one system call
_MIN_SEPARATE_READ = 1 << 15  # elements; if as many others lie between such runs, each run is read separately


@dataclass(frozen=True, slots=True)
class FileState:
    """The properties of a file that change when it is replaced or written to."""

    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, file: Path | int) -> "FileState":
        """Return the state of a file, given by its path or a descriptor.

        Raises:
            OSError: there is no such file.
        """
        found = os.stat(file)
        return cls(found.st_ino, found.st_size, found.st_mtime_ns)

    def check(self, file: Path, found: "FileState") -> None:
        """Check that a file which now has the state `found` still has this state.

        Raises:
            CheckpointError: it was replaced, truncated or written to.
        """
        if found == self:
            return
        how = "replaced" if found.inode != self.inode else "truncated" if found.size < self.size else "written to"
        raise CheckpointError(
            f"{file} was {how} while the model was being loaded ({self.size} bytes before, {found.size} now): "
            "start again when it is no longer being changed"
        )


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """The place of a tensor in a file of `torch.save`: `offset` in bytes, `strides` in elements.

    With `whole`, only PyTorch can read the file, and only as a whole. Then `offset` is not a place in the file, but it
    is equal for tensors that begin at the same element of the same storage, and only for these.
    """

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    whole: bool = False


class StoredFile:
    """A file to read from, as a context manager that checks on entry and exit that the file has not changed.

    The file is not mapped into memory: if it were truncated then, the process would be killed by SIGBUS.
    """

    def __init__(self, path: Path, state: FileState | None, buffer: bytearray) -> None:
        """`buffer`: memory for `read`. `state`: the state that the file must have; None: it is not checked."""
        self._path = path
        self._state = state
        self._buffer = buffer
        self._fd = -1

    def __enter__(self) -> "StoredFile":
        """Open the file.

        Raises:
            CheckpointError: the file can't be opened, or has changed.
        """
        try:
            self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{self._path} can't be read: {error.strerror}") from None
        try:
            self._check()
        except BaseException:
            os.close(self._fd)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Close the file.

        Raises:
            CheckpointError: the file has changed in the meantime.
        """
        try:
            if kind is None:
                self._check()
        finally:
            os.close(self._fd)

    def read(self, count: int, position: int) -> memoryview:
        """Return `count` bytes from `position` on. They are in the buffer, so they are valid until the next call.

        Raises:
            CheckpointError: the file can't be read, or is too short.
        """
        found = memoryview(self._buffer)[:count]
        self.read_into(found, position)
        return found

    def read_into(self, target: memoryview, position: int) -> None:
        """Fill `target` with the bytes of the file from `position` on. Raises the errors of `read`."""
        done = 0
        while done < len(target):
            try:
                count = os.preadv(self._fd, [target[done : done + _MAX_READ_BYTES]], position + done)
            except OSError as error:
                raise CheckpointError(f"{self._path} can't be read: {error.strerror}") from None
            if not count:
                raise CheckpointError(
                    f"{self._path} was truncated while it was being read: it ends after {position + done} bytes, "
                    f"{len(target) - done} bytes too early; start again when it is complete"
                )
            done += count

    def _check(self) -> None:
        if self._state is not None:
            self._state.check(self._path, FileState.of(self._fd))


def split_into_reads(shape: Sequence[int], strides: Sequence[int], limit: int) -> Iterator[tuple[slice, ...]]:
    """Split a tensor that is stored with these strides (in elements) into parts that are read one after the other.

    Each part is given by one slice for each dimension. The elements of a part lie within `limit` consecutive elements
    of the file.
    """
    if 0 in shape:
        return
    if not shape:
        yield ()
        return
    dim = max(range(len(shape)), key=lambda i: strides[i] if shape[i] > 1 else -1)
    others = [*shape[:dim], *shape[dim + 1 :]], [*strides[:dim], *strides[dim + 1 :]]
    reach = 1 + sum((size - 1) * stride for size, stride in zip(*others, strict=True))
    step = 1 + max(0, limit - reach) // max(strides[dim], 1)
    if strides[dim] > 2 * reach >= 2 * _MIN_SEPARATE_READ:  # more elements lie between than are wanted
        step = 1
    for first in range(0, shape[dim], step):
        for rest in split_into_reads(*others, limit) if reach > limit else [(slice(None),) * len(others[0])]:
            yield (*rest[:dim], slice(first, first + step), *rest[dim:])
