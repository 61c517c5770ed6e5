"""Threads for work that would block the event loop.

Python runs one thread at a time, so more threads would not be faster: there are few, so that the event loop gets its
turn soon. Large work has a thread of its own, so that small work never waits behind it.
"""

import asyncio
import contextlib
import contextvars
import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")
_Task = tuple[asyncio.AbstractEventLoop, "asyncio.Future[Any]", Callable[[], Any]]

_AT_ONCE = 8 << 10  # bytes: up to here the work takes less time than handing it to a thread
_LARGE = 512 << 10  # bytes: from here on work counts as large


class WorkThreads:
    """A queue of work and up to `count` threads that do it. They end with the process, even in the middle of work."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._tasks: queue.SimpleQueue[_Task] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    async def run(self, work: Callable[[], T]) -> T:
        """Run `work` on a thread, and return or raise its outcome.

        If the caller is cancelled before the work begins, it is not done.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        context = contextvars.copy_context()
        self._tasks.put((loop, future, lambda: context.run(work)))
        if len(self._threads) < self._count:
            self._threads.append(threading.Thread(target=self._serve, name="shoal-work", daemon=True))
            self._threads[-1].start()
        try:
            return await future
        finally:
            del future  # it holds the error, whose traceback holds this frame

    def _serve(self) -> None:
        while True:
            loop, future, work = self._tasks.get()
            if not future.cancelled():
                with contextlib.suppress(RuntimeError):  # the loop was closed: no task waits any more
                    loop.call_soon_threadsafe(_outcome(work), future)
            del future, work  # the traceback of an error refers to this frame, which would keep the work alive


def _outcome(work: Callable[[], Any]) -> Callable[["asyncio.Future[Any]"], None]:
    """Run the work, and return a function that settles its future."""
    try:
        return partial(_set_result, work())
    except BaseException as error:  # noqa: BLE001 - the caller gets it
        return partial(_set_error, error)


def _set_result(found: Any, future: "asyncio.Future[Any]") -> None:
    if not future.cancelled():
        future.set_result(found)


def _set_error(error: BaseException, future: "asyncio.Future[Any]") -> None:
    if not future.cancelled():
        future.set_exception(error)


_small = WorkThreads(4)
_large = WorkThreads(1)


async def off_loop(work: Callable[[], T], size: int, *, quick: bool = True) -> T:
    """Run `work` off the event loop, and return or raise its outcome.

    Args:
        size: about how many bytes the work reads.
        quick: whether the time of the work depends on the size alone. Quick work of a small size is done immediately,
            in this thread.
    """
    if quick and size <= _AT_ONCE:
        return work()
    return await (_large if size > _LARGE else _small).run(work)
