"""Files that Git LFS has left in place of others: a few lines that say what should be there."""

from pathlib import Path

from shoal.errors import CheckpointError

_FIRST_LINE = b"version https://git-lfs.github.com/spec/v1"


def refuse_pointer(file: Path) -> None:
    """Does nothing where there is no file, or where it can't be read: whoever reads it next says that better.

    Raises:
        CheckpointError: it is such a file.
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
