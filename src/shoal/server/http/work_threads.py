"""Threads for work that would keep the event loop.

Python runs one of its threads at a time, so more of them make nothing quicker: they are few, so that the event loop
soon has its turn. What is large waits for the large, and never before what is small.
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

_AT_ONCE = 8 << 10  # bytes of what is done in less time than another thread takes to begin
_LARGE = 512 << 10


class WorkThreads:
    """`count` threads, which do what they are given in turn. They end with the process, whatever they are at."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._tasks: queue.SimpleQueue[_Task] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    async def run(self, work: Callable[[], T]) -> T:
        """What `work` gives, or raises. If nobody waits for it any more before it has begun, it is left undone."""
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
                with contextlib.suppress(RuntimeError):  # the loop was closed: nobody is left to tell
                    loop.call_soon_threadsafe(_outcome(work), future)
            del future, work  # an error's traceback leads here, and would keep all that the work was about


def _outcome(work: Callable[[], Any]) -> Callable[["asyncio.Future[Any]"], None]:
    """Does the work, and gives what settles its future."""
    try:
        return partial(_set_result, work())
    except BaseException as error:  # noqa: BLE001 - it belongs to whoever waits
        return partial(_set_error, error)


def _set_result(found: Any, future: "asyncio.Future[Any]") -> None:
    if not future.cancelled():
        future.set_result(found)


def _set_error(error: BaseException, future: "asyncio.Future[Any]") -> None:
    if not future.cancelled():
        future.set_exception(error)


_small = WorkThreads(4)
_large = WorkThreads(1)


async def apart(work: Callable[[], T], size: int, *, quick: bool = True) -> T:
    """What `work` gives. `size`: about how many bytes it looks at; where they are few, and it is `quick` with them, it
    is done at once."""
    if quick and size <= _AT_ONCE:
        return work()
    return await (_large if size > _LARGE else _small).run(work)
