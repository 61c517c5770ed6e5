from collections.abc import Mapping
from pathlib import Path

import pytest

from support.recorded_host import Tree


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Return a function that writes files as the kernel would show them, and returns their root."""

    def write(files: Mapping[str, str]) -> Path:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    return write
