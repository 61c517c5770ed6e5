"""Files of a model that must stay as they are from the moment at which they are first looked at until they are read.

Free of torch.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from shoal.errors import CheckpointError

_MOST = 1 << 30  # bytes of one read
_WORTH_A_READ = 1 << 15  # elements that are read by themselves rather than with as many others between


@dataclass(frozen=True, slots=True)
class FileState:
    """What changes when a file is replaced or written to."""

    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, file: Path | int) -> "FileState":
        """`file`: a path or a descriptor.

        Raises:
            OSError
        """
        found = os.stat(file)
        return cls(found.st_ino, found.st_size, found.st_mtime_ns)

    def check(self, file: Path, found: "FileState") -> None:
        """
        Raises:
            CheckpointError: the file is not what it was; it says by what one sees that.
        """
        if found == self:
            return
        how = "replaced" if found.inode != self.inode else "truncated" if found.size < self.size else "written to"
        raise CheckpointError(
            f"{file} was {how} while the model was loaded ({self.size} bytes then, {found.size} now): "
            "start again once nobody changes it any more"
        )


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies in a file of `torch.save`: `offset` in bytes, `strides` in elements.

    With `whole`, only PyTorch can read the file, and only all of it at once; `offset` is then no place in the file. It
    is equal for tensors that begin at the same number of the same storage, and for no others.
    """

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    whole: bool = False


class StoredFile:
    """A file to read from; entered and left it looks whether it is still the one whose headers were read.

    Reading takes no mapping of the file: in one, a page that is lost by truncation ends the process by SIGBUS.
    """

    def __init__(self, path: Path, state: FileState | None, buffer: bytearray) -> None:
        """`buffer` is what `read` reads into. Without a `state` the file may be any."""
        self._path = path
        self._state = state
        self._buffer = buffer
        self._fd = -1

    def __enter__(self) -> "StoredFile":
        """Raises:
        CheckpointError: it can't be opened, or has changed.
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
        """Raises:
        CheckpointError: it has changed meanwhile.
        """
        try:
            if kind is None:
                self._check()
        finally:
            os.close(self._fd)

    def read(self, count: int, position: int) -> memoryview:
        """The buffer's beginning: valid until the next call.

        Raises:
            CheckpointError: the file can't be read, or ends before.
        """
        found = memoryview(self._buffer)[:count]
        self.read_into(found, position)
        return found

    def read_into(self, place: memoryview, position: int) -> None:
        """Fills `place` with what the file has from `position` on. Raises as `read`."""
        done = 0
        while done < len(place):
            try:
                count = os.preadv(self._fd, [place[done : done + _MOST]], position + done)
            except OSError as error:
                raise CheckpointError(f"{self._path} can't be read: {error.strerror}") from None
            if not count:
                raise CheckpointError(
                    f"{self._path} was truncated while it was read: it ends after {position + done} bytes, and "
                    f"{len(place) - done} more were to come; start again once it is whole"
                )
            done += count

    def _check(self) -> None:
        if self._state is not None:
            self._state.check(self._path, FileState.of(self._fd))


def parts(shape: Sequence[int], strides: Sequence[int], most: int) -> Iterator[tuple[slice, ...]]:
    """Cuts what lies in a file by these strides (in elements) into parts to be read one after the other: together they
    are all of it, and none reaches over more than `most` elements of the file."""
    if 0 in shape:
        return
    if not shape:
        yield ()
        return
    dim = max(range(len(shape)), key=lambda i: strides[i] if shape[i] > 1 else -1)
    others = [*shape[:dim], *shape[dim + 1 :]], [*strides[:dim], *strides[dim + 1 :]]
    reach = 1 + sum((size - 1) * stride for size, stride in zip(*others, strict=True))
    step = 1 + max(0, most - reach) // max(strides[dim], 1)
    if strides[dim] > 2 * reach >= 2 * _WORTH_A_READ:  # more lies between than is wanted
        step = 1
    for first in range(0, shape[dim], step):
        for rest in parts(*others, most) if reach > most else [(slice(None),) * len(others[0])]:
            yield (*rest[:dim], slice(first, first + step), *rest[dim:])
