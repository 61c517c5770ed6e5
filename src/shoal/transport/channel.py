"""Frames of bytes between two processes: over a socket pair between a process and its child, over TCP between hosts.

A socket pair has no name and no port, nothing of it outlives its processes, and its end is told at once when the
process on the other side dies, whatever killed it.
"""

import contextlib
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Sequence

from shoal.process.forks import let_go_in_children

_LENGTH = struct.Struct("<I")
_LONGEST = 2**32 - 1
_RECEIVE_BYTES = 1 << 18
_MOST_READS = 64


class ChannelClosed(Exception):
    """The process at the other end has gone."""


class Channel:
    """One end. `send` may be called from several threads; `receive` from one. In a forked child it is closed."""

    def __init__(self, sock: socket.socket, longest: int = _LONGEST) -> None:
        """`longest`: bytes of a frame that is taken; whoever sends a longer one is not listened to any more."""
        sock.setblocking(False)
        self.longest = longest
        self._socket = sock
        self._incoming = bytearray()
        self._outgoing: deque[memoryview] = deque()
        self._lock = threading.Lock()
        let_go_in_children(self)

    def let_go(self) -> None:
        """In a forked child, where a thread that is not there may have held the lock."""
        self._lock = threading.Lock()
        self._socket.close()

    @classmethod
    def pair(cls) -> tuple["Channel", socket.socket]:
        """This process's end, and a socket for the child, which makes it its own with `from_fd`."""
        ours, theirs = socket.socketpair()
        return cls(ours), theirs

    @classmethod
    def from_fd(cls, fd: int) -> "Channel":
        return cls(socket.socket(fileno=fd))

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def local_address(self) -> str:
        """Of this end of a TCP connection."""
        return str(self._socket.getsockname()[0])

    @property
    def has_frame(self) -> bool:
        """Has `receive` something to give, or to say, without a `wait` before it?"""
        if len(self._incoming) < _LENGTH.size:
            return False
        length = int.from_bytes(self._incoming[: _LENGTH.size], "little")
        return length > self.longest or len(self._incoming) >= _LENGTH.size + length

    def send(self, frame: bytes) -> None:
        """Never blocks: what the socket does not take now waits for `flush` or the next `send`.

        Raises:
            ChannelClosed: nobody is there to read it.
        """
        with self._lock:
            self._outgoing.append(memoryview(_LENGTH.pack(len(frame)) + frame))
            self._write()

    def flush(self, timeout: float) -> bool:
        """Tries for up to `timeout` seconds to get everything out; True if it is."""
        deadline = time.monotonic() + timeout
        while self._outgoing:
            with self._lock:
                self._write()
            remaining = deadline - time.monotonic()
            if self._outgoing and (remaining <= 0 or not self._takes_more(remaining)):
                return False
        return True

    def _takes_more(self, timeout: float) -> bool:
        poller = select.poll()
        poller.register(self._socket, select.POLLOUT)
        return bool(poller.poll(timeout * 1000))

    @property
    def backlog(self) -> bool:
        """Is something waiting to be written?"""
        return bool(self._outgoing)

    def _write(self) -> None:
        try:
            while self._outgoing:
                first = self._outgoing[0]
                sent = self._socket.send(first)
                if sent < len(first):
                    self._outgoing[0] = first[sent:]
                else:
                    self._outgoing.popleft()
        except BlockingIOError:
            pass
        except OSError as error:
            raise ChannelClosed(str(error)) from error

    def receive(self, most: int | None = None) -> list[bytes]:
        """The frames that have arrived in whole, [] if none has. Never blocks.

        With `most`, bytes behind so many frames are kept for the next call, but `wait` does not know of them;
        `has_frame` does.

        Raises:
            ChannelClosed: no whole frame is left and the other end has gone.
        """
        closed = False
        try:
            for _ in range(_MOST_READS):  # so that whoever sends without end does not fill the memory
                data = self._socket.recv(_RECEIVE_BYTES)
                closed = not data
                if closed:
                    break
                self._incoming += data
        except BlockingIOError:
            pass
        except OSError:
            closed = True
        frames = self._take_frames(most)
        if closed and not frames:
            raise ChannelClosed("end of file")
        return frames

    def _take_frames(self, most: int | None) -> list[bytes]:
        frames: list[bytes] = []
        start = 0
        while len(self._incoming) - start >= _LENGTH.size and len(frames) != most:
            (length,) = _LENGTH.unpack_from(self._incoming, start)
            if length > self.longest:
                raise ChannelClosed(f"a frame of {length} bytes, more than the {self.longest} that are taken")
            stop = start + _LENGTH.size + length
            if len(self._incoming) < stop:
                break
            frames.append(bytes(self._incoming[start + _LENGTH.size : stop]))
            start = stop
        del self._incoming[:start]
        return frames

    def hang_up(self) -> None:
        """Ends the connection, which wakes a thread that waits for it; the descriptor stays until `close`."""
        with contextlib.suppress(OSError):  # the other side was first
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()


def wait(channels: Sequence[Channel], timeout: float) -> list[Channel]:
    """The channels with something to read, waiting up to `timeout` seconds; writes out backlogs meanwhile.

    A channel whose other end has gone is one of them: `receive` gives its last words, and then says so. So is one that
    was closed here, perhaps by another thread: nobody waits for what never comes.
    """
    poller = select.poll()
    found = [(channel.fileno(), channel) for channel in channels]
    readable = [channel for fd, channel in found if fd < 0]
    if readable:
        timeout = 0.0
    by_fd = {fd: channel for fd, channel in found if fd >= 0}
    for fd, channel in by_fd.items():
        poller.register(fd, select.POLLIN | (select.POLLOUT if channel.backlog else 0))
    for fd, events in poller.poll(max(0.0, timeout) * 1000):
        if events & select.POLLOUT:
            with contextlib.suppress(ChannelClosed):
                by_fd[fd].flush(0)
        if events & ~select.POLLOUT:
            readable.append(by_fd[fd])
    return readable
