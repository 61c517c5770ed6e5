"""A thread on which an engine runs, and the channel to it, with the same messages as to a process."""

import contextlib
import threading
from collections.abc import Callable

from shoal.transport.channel import Channel, ChannelClosed


class ThreadHost:
    """A thread as an `EngineHost`. A thread cannot be killed: it ends when its channel is closed."""

    def __init__(self, serve: Callable[[Channel], None], name: str) -> None:
        self.channel, theirs = Channel.pair()
        self._thread = threading.Thread(target=self._run, args=(serve, Channel(theirs)), name=name, daemon=True)
        self._thread.start()

    def _run(self, serve: Callable[[Channel], None], channel: Channel) -> None:
        try:
            serve(channel)
        finally:
            channel.close()

    def stopped(self) -> bool:
        return False

    def describe_exit(self, patience: float = 1.0) -> str:
        return "has ended"

    def say(self, goodbye: bytes) -> None:
        with contextlib.suppress(ChannelClosed, OSError):
            self.channel.send(goodbye)

    def wait(self, timeout: float) -> bool:
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def kill(self) -> None:
        self.channel.close()
