from typing import Any

from shoal.transport.channel import wait
from shoal.transport.waker import Waker


def test_it_ends_waits_until_it_is_cleared() -> None:
    waker: Any = Waker()
    assert wait([waker], 0) == []
    for _ in range(3):
        waker.wake()
    assert wait([waker], 0) == [waker]
    assert wait([waker], 0) == [waker]
    waker.clear()
    assert wait([waker], 0) == []
    waker.clear()
    waker.wake()
    assert wait([waker], 0) == [waker], "it can be used again"
    waker.close()


def test_a_closed_waker_does_nothing() -> None:
    waker = Waker()
    waker.wake()
    waker.close()
    waker.wake()
    waker.clear()
    waker.close()
