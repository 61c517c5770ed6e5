from functools import partial
from pathlib import Path

import pytest

from support.recorded_host import Tree, write_tree


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Return a function that writes files as the kernel would show them, and returns their root."""
    return partial(write_tree, tmp_path)
