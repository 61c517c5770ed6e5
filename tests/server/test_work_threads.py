"""Work beside the event loop."""

import asyncio
import contextlib
import gc
import threading
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from shoal.server.http.event_streams import unless_gone
from shoal.server.http.work_threads import WorkThreads, apart

WAIT_S = 60.0


def test_what_is_small_is_done_at_once_and_what_is_large_on_another_thread() -> None:
    async def where(size: int, *, quick: bool = True) -> str:
        return await apart(lambda: threading.current_thread().name, size, quick=quick)

    here = threading.current_thread().name
    assert asyncio.run(where(100)) == here
    for large in (1 << 16, 1 << 24):
        assert asyncio.run(where(large)) == "shoal-work"
    assert asyncio.run(where(100, quick=False)) == "shoal-work"


def test_an_error_is_that_of_who_waits() -> None:
    async def fail() -> None:
        await WorkThreads(1).run(lambda: int("x"))

    with pytest.raises(ValueError, match="invalid literal"):
        asyncio.run(fail())


def test_what_is_large_keeps_nothing_small_waiting() -> None:
    async def run() -> None:
        release = threading.Event()
        large = [asyncio.create_task(apart(lambda: release.wait(WAIT_S), 1 << 24)) for _ in range(20)]
        async with asyncio.timeout(WAIT_S):
            assert await apart(lambda: "done", 1 << 16) == "done"
        assert not any(task.done() for task in large)
        release.set()
        assert all(await asyncio.gather(*large))

    asyncio.run(run())


def test_what_nobody_waits_for_any_more_is_left_undone() -> None:
    async def run() -> None:
        threads, release, done = WorkThreads(1), threading.Event(), []
        first = asyncio.create_task(threads.run(lambda: release.wait(WAIT_S)))
        second = asyncio.create_task(threads.run(lambda: done.append("second")))
        await asyncio.sleep(0)
        second.cancel()
        release.set()
        await first
        await threads.run(lambda: done.append("third"))
        assert done == ["third"]

    asyncio.run(run())


class Body:
    """Stands for what a request has brought."""


def refuse(body: Body) -> None:
    raise ValueError("too large")


@pytest.fixture
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collector")
def test_a_failure_keeps_nothing_of_the_work() -> None:
    """Not even until the garbage collector finds it, which may take long while nothing happens."""

    async def go() -> None:
        threads = WorkThreads(1)
        body = Body()
        alive = weakref.ref(body)
        work = partial(refuse, body)
        del body
        with contextlib.suppress(ValueError):
            await threads.run(work)
        del work
        assert await threads.run(lambda: 5) == 5  # the thread is at something else by now
        assert alive() is None

    asyncio.run(go())


@pytest.mark.usefixtures("_no_collector")
def test_a_failure_of_an_answer_keeps_nothing_of_it() -> None:
    async def forever() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    async def fail(body: Body) -> None:
        refuse(body)

    async def go() -> None:
        body = Body()
        alive = weakref.ref(body)
        work = fail(body)
        del body
        with contextlib.suppress(ValueError):
            await unless_gone(forever, asyncio.create_task(work))
        del work
        await asyncio.sleep(0)
        assert alive() is None

    asyncio.run(go())
