"""When memory is given back to the system."""

import asyncio
import threading

import pytest

from shoal.server import memory
from shoal.server.memory import Tidier


def test_once_for_all_who_ask_in_the_meantime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_PAUSE_S", 0.001)
    calls: list[str] = []
    called = threading.Semaphore(0)

    def trim(pad: int) -> int:
        calls.append(threading.current_thread().name)
        called.release()
        return 1

    async def work() -> None:
        tidier = Tidier(trim)
        for count in (1, 2):
            for _ in range(10):
                tidier.soon()
            assert await asyncio.to_thread(called.acquire, timeout=60)
            assert len(calls) == count

    asyncio.run(work())
    assert threading.current_thread().name not in calls


@pytest.mark.skipif(memory._TRIM is None, reason="needs glibc")
def test_the_systems_own_gives_back_what_is_free() -> None:
    assert memory._TRIM is not None
    assert memory._TRIM(0) in (0, 1)  # it says whether there was anything


def test_where_the_system_has_no_such_call_nothing_is_planned() -> None:
    async def work() -> None:
        tidier = Tidier(None)
        tidier.soon()
        assert not tidier._due

    asyncio.run(work())
