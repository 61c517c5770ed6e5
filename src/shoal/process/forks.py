"""Objects that belong to one process: a child that it forks must neither use them nor end them."""

import os
import weakref
from typing import Protocol

from shoal.errors import ClosedError


class Owner:
    """The process that created an object; it alone may use the object."""

    def __init__(self, what: str) -> None:
        """`what`: the kind of the object, for the error."""
        self._what = what
        self._pid = os.getpid()

    @property
    def is_here(self) -> bool:
        return os.getpid() == self._pid

    def check(self) -> None:
        """Check that this process may use the object.

        Raises:
            ClosedError: this process was forked from the owner.
        """
        if not self.is_here:
            raise ClosedError(
                f"this {self._what} belongs to process {self._pid}, from which this one ({os.getpid()}) was forked: "
                "make a new one here, or start this process with spawn instead of fork, and make it there"
            )


class Shared(Protocol):
    """An object whose copy in a forked child is still connected to the parent's: a connection, a listening socket."""

    def close_in_child(self) -> None:
        """Close the copy in a forked child.

        The child can then not write to the parent's connection, and when the parent closes it, the other side notices
        that immediately. This must not wait for a lock: the thread that holds it does not exist in the child.
        """


_shared: "weakref.WeakSet[Shared]" = weakref.WeakSet()


def close_in_children(shared: Shared) -> None:
    """Call `close_in_child` of an object in every child that this process forks from now on."""
    _shared.add(shared)


def _close_in_child() -> None:
    for shared in list(_shared):
        shared.close_in_child()
    _shared.clear()


os.register_at_fork(after_in_child=_close_in_child)
