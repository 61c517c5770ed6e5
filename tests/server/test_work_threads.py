"""Work on threads beside the event loop."""

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
from shoal.server.http.work_threads import WorkThreads, off_loop

WAIT_S = 60.0


def test_small_work_is_done_immediately_and_large_work_on_another_thread() -> None:
    async def where(size: int, *, quick: bool = True) -> str:
        return await off_loop(lambda: threading.current_thread().name, size, quick=quick)

    here = threading.current_thread().name
    assert asyncio.run(where(100)) == here
    for large in (1 << 16, 1 << 24):
        assert asyncio.run(where(large)) == "shoal-work"
    assert asyncio.run(where(100, quick=False)) == "shoal-work"


def test_an_error_of_the_work_is_raised_in_the_caller() -> None:
    async def fail() -> None:
        await WorkThreads(1).run(lambda: int("x"))

    with pytest.raises(ValueError, match="invalid literal"):
        asyncio.run(fail())


def test_large_work_does_not_delay_small_work() -> None:
    async def run() -> None:
        release = threading.Event()
        large = [asyncio.create_task(off_loop(lambda: release.wait(WAIT_S), 1 << 24)) for _ in range(20)]
        async with asyncio.timeout(WAIT_S):
            assert await off_loop(lambda: "done", 1 << 16) == "done"
        assert not any(task.done() for task in large)
        release.set()
        assert all(await asyncio.gather(*large))

    asyncio.run(run())


def test_work_whose_caller_was_cancelled_is_not_done() -> None:
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
    """An object that stands for the data of a request."""


def refuse(body: Body) -> None:
    raise ValueError("too large")


@pytest.fixture
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.slow
@pytest.mark.usefixtures("_no_collector")
def test_a_failure_keeps_no_reference_to_the_work() -> None:
    """Its memory is freed at once, not only when the garbage collector runs, which may take long in an idle process."""

    async def go() -> None:
        threads = WorkThreads(1)
        body = Body()
        alive = weakref.ref(body)
        work = partial(refuse, body)
        del body
        with contextlib.suppress(ValueError):
            await threads.run(work)
        del work
        assert await threads.run(lambda: 5) == 5  # the thread has begun other work
        assert alive() is None

    asyncio.run(go())


@pytest.mark.slow
@pytest.mark.usefixtures("_no_collector")
def test_a_failure_of_an_answer_keeps_no_reference_to_it() -> None:
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
