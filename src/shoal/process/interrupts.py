"""Ctrl-C that takes effect where an engine can be left as it is."""

import os
import signal
import threading
from types import FrameType, TracebackType


class Interrupts:
    """How Ctrl-C becomes a KeyboardInterrupt in this process. Signals arrive on the main thread: elsewhere nothing is
    held. A program's own handler of SIGINT is left alone."""

    def __init__(self) -> None:
        self._depth = 0  # how many `Held` are entered where it is held
        self.came = False  # one waits
        os.register_at_fork(after_in_child=self._forget)

    def held(self) -> "Held":
        return Held(self)

    def check(self) -> None:
        """
        Raises:
            KeyboardInterrupt: one has come that was held.
        """
        if self.came and self._depth and threading.current_thread() is threading.main_thread():
            self.came = False
            raise KeyboardInterrupt

    def hold(self) -> bool:
        """True if it holds from now on, until `let`."""
        if threading.current_thread() is not threading.main_thread():
            return False
        if not self._depth:
            if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
                return False
            self.came = False
            signal.signal(signal.SIGINT, self._note)
        self._depth += 1
        return True

    def let(self) -> bool:
        """True if one has come that nobody has heard of."""
        self._depth -= 1
        if self._depth:
            return False
        signal.signal(signal.SIGINT, signal.default_int_handler)
        came, self.came = self.came, False
        return came

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came = True

    def _forget(self) -> None:
        """In a forked child, where whoever holds it may not be there any more."""
        if self._depth:
            self._depth = 0
            signal.signal(signal.SIGINT, signal.default_int_handler)


class Held:
    """While it is entered Ctrl-C waits: until `check` is called, or the outermost one ends. Several count as one."""

    def __init__(self, interrupts: Interrupts) -> None:
        self._interrupts = interrupts
        self._holds = False

    def __enter__(self) -> None:
        self._holds = self._interrupts.hold()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._holds and self._interrupts.let() and not isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt from error


interrupts = Interrupts()
