import gc
import subprocess
import sys
import weakref

from shoal import garbage


class Node:
    def __init__(self) -> None:
        self.own = self


def test_everything_is_looked_through_where_nothing_was_settled() -> None:
    node = weakref.ref(Node())
    garbage.collect()
    assert node() is None
    assert gc.get_freeze_count() == 0


SETTLED = """
import gc, weakref
from shoal import garbage
class Node:
    def __init__(self):
        self.own = self
node = Node()
garbage.settle()
before = gc.get_freeze_count()
found = weakref.ref(node)
del node
gc.collect()
assert found() is not None, "left out of an ordinary collection"
garbage.collect()
assert found() is None
assert 0.9 < gc.get_freeze_count() / before < 1.1, "settled again"
"""


def test_what_was_settled_is_left_out_until_all_is_asked_for() -> None:
    subprocess.run([sys.executable, "-c", SETTLED], check=True)
