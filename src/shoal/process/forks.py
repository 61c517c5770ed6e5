"""What belongs to one process: a child that it forks neither uses it nor ends it."""

import os
import weakref
from typing import Protocol

from shoal.errors import ClosedError


class Owner:
    """The process that has made something."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._pid = os.getpid()

    @property
    def is_here(self) -> bool:
        return os.getpid() == self._pid

    def check(self) -> None:
        """
        Raises:
            ClosedError: this process was forked from the owner.
        """
        if not self.is_here:
            raise ClosedError(
                f"this {self._what} belongs to process {self._pid}, from which this one ({os.getpid()}) was forked: "
                "make a new one here, or start this process with spawn instead of fork, and make it there"
            )


class Shared(Protocol):
    """Something whose copy in a forked child reaches what the parent has: a connection, a listening socket."""

    def let_go(self) -> None:
        """Closes the child's copy, so that nothing said or ended there is felt in the parent, and the parent's own end
        of it is noticed on the other side at once. May wait for no lock: who held it is not there any more."""


_shared: "weakref.WeakSet[Shared]" = weakref.WeakSet()


def let_go_in_children(each: Shared) -> None:
    """Has `let_go` called in every child that this process forks from now on."""
    _shared.add(each)


def _let_go() -> None:
    for each in list(_shared):
        each.let_go()
    _shared.clear()


os.register_at_fork(after_in_child=_let_go)
