import subprocess
import sys

import pytest

CYCLE = """
import gc, weakref
from shoal.process import garbage_collector
class Node:
    def __init__(self):
        self.own = self
node = Node()
found = weakref.ref(node)
"""
NOT_FROZEN = """
del node
garbage_collector.collect()
assert found() is None
assert gc.get_freeze_count() == 0, "nothing is frozen unless the caller did it"
"""
FROZEN = """
garbage_collector.freeze()
before = gc.get_freeze_count()
del node
gc.collect()
assert found() is not None, "an ordinary collection ignores it"
garbage_collector.collect()
assert found() is None
assert 0.9 < gc.get_freeze_count() / before < 1.1, "the rest is frozen again"
"""


@pytest.mark.slow
@pytest.mark.parametrize("program", [NOT_FROZEN, FROZEN], ids=["not frozen", "frozen"])
def test_only_a_full_collection_includes_frozen_objects(program: str) -> None:
    subprocess.run([sys.executable, "-c", CYCLE + program], check=True)
