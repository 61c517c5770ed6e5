"""Delays Ctrl-C until a point at which the engine is in a consistent state."""

import os
import signal
import threading
from types import FrameType, TracebackType


class Interrupts:
    """Delays the KeyboardInterrupt of this process.

    Signals arrive on the main thread, so other threads delay nothing. A program's own handler of SIGINT is kept.
    """

    def __init__(self) -> None:
        self._depth = 0  # the number of nested `Held` that delay interrupts
        self.pending = False  # an interrupt has arrived and waits
        os.register_at_fork(after_in_child=self._forget)

    def held(self) -> "Held":
        return Held(self)

    def check(self) -> None:
        """Raise the interrupt that waits, if there is one.

        Raises:
            KeyboardInterrupt
        """
        if self.pending and self._depth and threading.current_thread() is threading.main_thread():
            self.pending = False
            raise KeyboardInterrupt

    def hold(self) -> bool:
        """Start to delay interrupts until `release`. Return False if this thread or program cannot delay them."""
        if threading.current_thread() is not threading.main_thread():
            return False
        if not self._depth:
            if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
                return False
            self.pending = False
            signal.signal(signal.SIGINT, self._note)
        self._depth += 1
        return True

    def release(self) -> bool:
        """Stop to delay interrupts. Return whether one has arrived and waits."""
        self._depth -= 1
        if self._depth:
            return False
        signal.signal(signal.SIGINT, signal.default_int_handler)
        pending, self.pending = self.pending, False
        return pending

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.pending = True

    def _forget(self) -> None:
        """Restore the handler in a forked child: the thread that delays interrupts may not exist there."""
        if self._depth:
            self._depth = 0
            signal.signal(signal.SIGINT, signal.default_int_handler)


class Held:
    """A context in which Ctrl-C waits until `check` is called or the outermost such context ends. Counts as one."""

    def __init__(self, interrupts: Interrupts) -> None:
        self._interrupts = interrupts
        self._holds = False

    def __enter__(self) -> None:
        self._holds = self._interrupts.hold()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._holds and self._interrupts.release() and not isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt from error


interrupts = Interrupts()
