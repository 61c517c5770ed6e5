"""A thread that reads from a connection to another host, for a process that may be busy for many seconds.

The kernel ends a connection (see `rendezvous.enable_keepalive`) whose other side accepts nothing for that long, since
it cannot distinguish an unreachable host from a process that does not read. A relay always reads.
"""

import contextlib
import threading

from shoal.transport.channel import Channel, ChannelClosed, wait

_IDLE_S = 3600.0
_FLUSH_S = 1.0


class Relay:
    """Owns a connection, and forwards its frames in both directions. Use `channel` in its place; they end together."""

    def __init__(self, outer: Channel) -> None:
        self.channel, theirs = Channel.pair()
        self._outer = outer
        self._inner = Channel(theirs)
        self._thread = threading.Thread(target=self._run, name="shoal-relay", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Send the last frames, for up to a second, and end the connection. May be called again."""
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
