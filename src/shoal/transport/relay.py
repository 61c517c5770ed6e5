"""A thread that reads a connection to another host, for a program that is busy for seconds at a time.

The kernel ends a watched connection (`rendezvous.watch_host`) whose other side takes nothing for that long; it can't
tell a host that is cut off from a program that does not read. A relay always reads.
"""

import contextlib
import threading

from shoal.transport.channel import Channel, ChannelClosed, wait

_IDLE_S = 3600.0
_FLUSH_S = 1.0


class Relay:
    """Takes over a connection. `channel` is what to use in its place; it ends when the connection does."""

    def __init__(self, outer: Channel) -> None:
        self.channel, theirs = Channel.pair()
        self._outer = outer
        self._inner = Channel(theirs)
        self._thread = threading.Thread(target=self._run, name="shoal-relay", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the connection, once what was sent last is out or nobody takes it. Idempotent."""
        self.channel.close()
        self._thread.join()

    def _run(self) -> None:
        try:
            while True:
                for source in wait([self._outer, self._inner], _IDLE_S):
                    target = self._inner if source is self._outer else self._outer
                    for frame in source.receive():
                        target.send(frame)
        except ChannelClosed:
            pass
        finally:
            self._close(self._inner)
            self._close(self._outer)

    def _close(self, channel: Channel) -> None:
        with contextlib.suppress(ChannelClosed):
            channel.flush(_FLUSH_S)
        channel.close()
