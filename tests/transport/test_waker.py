from typing import Any

from shoal.transport.channel import wait
from shoal.transport.waker import Waker


def test_it_ends_a_wait_until_it_is_quiet() -> None:
    waker: Any = Waker()
    assert wait([waker], 0) == []
    for _ in range(3):
        waker.wake()
    assert wait([waker], 0) == [waker]
    assert wait([waker], 0) == [waker]
    waker.quiet()
    assert wait([waker], 0) == []
    waker.quiet()
    waker.wake()
    assert wait([waker], 0) == [waker], "each time anew"
    waker.close()


def test_after_its_end_it_does_nothing() -> None:
    waker = Waker()
    waker.wake()
    waker.close()
    waker.wake()
    waker.quiet()
    waker.close()
