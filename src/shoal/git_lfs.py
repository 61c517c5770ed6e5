"""Pointers of Git LFS: small text files in place of files that were not downloaded."""

from pathlib import Path

from shoal.errors import CheckpointError

_FIRST_LINE = b"version https://git-lfs.github.com/spec/v1"


def refuse_pointer(file: Path) -> None:
    """Refuse a file that is a pointer of Git LFS. A file that can't be read is left to its reader, which reports it.

    Raises:
        CheckpointError: it is a pointer.
    """
    try:
        with file.open("rb") as stream:
            found = stream.read(len(_FIRST_LINE))
    except OSError:
        return
    if found == _FIRST_LINE:
        raise CheckpointError(
            f"{file} is a pointer of Git LFS, not the file itself: run `git lfs pull` in {file.parent}, "
            "or download the model again"
        )
