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
UNSETTLED = """
del node
garbage_collector.collect()
assert found() is None
assert gc.get_freeze_count() == 0, "that is for the caller to decide"
"""
SETTLED = """
garbage_collector.freeze()
before = gc.get_freeze_count()
del node
gc.collect()
assert found() is not None, "left out of an ordinary collection"
garbage_collector.collect()
assert found() is None
assert 0.9 < gc.get_freeze_count() / before < 1.1, "settled again"
"""


@pytest.mark.parametrize("program", [UNSETTLED, SETTLED], ids=["unsettled", "settled"])
def test_what_was_settled_is_left_out_until_all_is_asked_for(program: str) -> None:
    subprocess.run([sys.executable, "-c", CYCLE + program], check=True)
