"""Frames of bytes between two processes: over a socket pair between a process and its child, over TCP between hosts.

Connections to other hosts may be encrypted; then the channel has a `tls.TlsSocket` in place of a socket.

A socket pair has no name and no port, and nothing of it remains after its processes. When one process dies, for any
reason, the other one notices immediately.
"""

import contextlib
import fcntl
import select
import socket
import struct
import termios
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

from shoal.process.forks import close_in_children

_LENGTH = struct.Struct("<I")
_MAX_FRAME_BYTES = 2**32 - 1
_RECEIVE_BYTES = 1 << 18
_MAX_READS = 64


class ChannelClosed(Exception):
    """The connection has ended: the other process closed it or died. Its cause is the error of the socket, if any."""


class FrameTooLong(ChannelClosed):
    """The other process has announced a frame that is longer than allowed. `start` is the beginning of its bytes."""

    def __init__(self, message: str, start: bytes) -> None:
        super().__init__(message)
        self.start = start


class Socket(Protocol):
    """The part of a socket that a channel uses. No call blocks."""

    def setblocking(self, flag: bool, /) -> None: ...

    def fileno(self) -> int: ...

    def recv(self, size: int, /) -> bytes: ...

    def send(self, data: memoryview, /) -> int: ...

    def getsockname(self) -> Any: ...

    def getpeername(self) -> Any: ...

    def shutdown(self, how: int, /) -> None: ...

    def close(self) -> None: ...


class Channel:
    """One end of a connection.

    Several threads may call `send`; only one may call `receive`. In a forked child the channel is closed.
    """

    def __init__(self, sock: Socket, max_frame_bytes: int = _MAX_FRAME_BYTES) -> None:
        """A frame that is longer than `max_frame_bytes` makes `receive` raise ChannelClosed."""
        sock.setblocking(False)
        self.max_frame_bytes = max_frame_bytes
        self._socket = sock
        self._incoming = bytearray()
        self._outgoing: deque[memoryview] = deque()
        self._lock = threading.Lock()
        close_in_children(self)

    def close_in_child(self) -> None:
        """Close the socket in a forked child, whose copy of the lock may be held by a thread that was not forked."""
        self._lock = threading.Lock()
        self._socket.close()

    @classmethod
    def pair(cls) -> tuple["Channel", socket.socket]:
        """Return this process's end, and the other end's socket, which the child makes a channel with `from_fd`."""
        ours, theirs = socket.socketpair()
        return cls(ours), theirs

    @classmethod
    def from_fd(cls, fd: int) -> "Channel":
        return cls(socket.socket(fileno=fd))

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def local_address(self) -> str:
        """The IP address of this end of a TCP connection."""
        return str(self._socket.getsockname()[0])

    @property
    def peer_address(self) -> str:
        """The IP address of the other end of a TCP connection."""
        return str(self._socket.getpeername()[0])

    @property
    def has_frame(self) -> bool:
        """True if `receive` would return a frame or raise an error from bytes that were read already."""
        if len(self._incoming) < _LENGTH.size:
            return False
        length = int.from_bytes(self._incoming[: _LENGTH.size], "little")
        return length > self.max_frame_bytes or len(self._incoming) >= _LENGTH.size + length

    def send(self, frame: bytes) -> None:
        """Send a frame without blocking: bytes that the socket does not accept now wait for `flush` or the next `send`.

        Raises:
            ChannelClosed: the connection has ended.
        """
        with self._lock:
            self._outgoing.append(memoryview(_LENGTH.pack(len(frame)) + frame))
            self._write()

    def flush(self, timeout: float) -> bool:
        """Write all waiting bytes, for up to `timeout` seconds. Return whether all are written."""
        deadline = time.monotonic() + timeout
        while self._outgoing:
            with self._lock:
                self._write()
            remaining = deadline - time.monotonic()
            if self._outgoing and (remaining <= 0 or not self._wait_writable(remaining)):
                return False
        return True

    def _wait_writable(self, timeout: float) -> bool:
        poller = select.poll()
        poller.register(self._socket.fileno(), select.POLLOUT)
        return bool(poller.poll(timeout * 1000))

    @property
    def backlog(self) -> bool:
        """True if bytes are waiting to be written."""
        return bool(self._outgoing)

    @property
    def is_empty(self) -> bool:
        """True if this end holds no bytes: all were written, and all that were read were returned as frames."""
        return not self._outgoing and not self._incoming

    @property
    def is_acknowledged(self) -> bool:
        """True if the other host has received everything that was sent over this TCP connection."""
        if self._outgoing:
            return False
        try:
            waiting = fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, bytes(4))
        except (OSError, ValueError):  # it was closed here
            return False
        return not any(waiting)

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

    def receive(self, max_frames: int | None = None) -> list[bytes]:
        """Return the complete frames that have arrived, without blocking.

        Bytes after `max_frames` frames are kept for the next call. `wait` does not know of them, but `has_frame` does.

        Raises:
            ChannelClosed: the connection has ended and no complete frame is left.
        """
        closed = False
        failure: OSError | None = None
        try:
            for _ in range(_MAX_READS):  # a limit, so that an endless stream does not fill the memory
                data = self._socket.recv(_RECEIVE_BYTES)
                closed = not data
                if closed:
                    break
                self._incoming += data
        except BlockingIOError:
            pass
        except OSError as error:
            closed, failure = True, error
        frames = self._take_frames(max_frames)
        if closed and not frames:
            raise ChannelClosed("end of file" if failure is None else str(failure)) from failure
        return frames

    def _take_frames(self, max_frames: int | None) -> list[bytes]:
        frames: list[bytes] = []
        start = 0
        while len(self._incoming) - start >= _LENGTH.size and len(frames) != max_frames:
            (length,) = _LENGTH.unpack_from(self._incoming, start)
            if length > self.max_frame_bytes:
                too_long = f"a frame of {length} bytes, at most {self.max_frame_bytes} are allowed"
                raise FrameTooLong(too_long, bytes(self._incoming[start : start + _LENGTH.size]))
            stop = start + _LENGTH.size + length
            if len(self._incoming) < stop:
                break
            frames.append(bytes(self._incoming[start + _LENGTH.size : stop]))
            start = stop
        del self._incoming[:start]
        return frames

    def shut_down(self) -> None:
        """End the connection, which wakes a thread that waits for it. The descriptor stays valid until `close`."""
        with contextlib.suppress(OSError):  # the other side has ended it already
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()


def wait(channels: Sequence[Channel], timeout: float) -> list[Channel]:
    """Wait up to `timeout` seconds, and return the readable channels. Meanwhile waiting bytes are written.

    A channel whose connection has ended is readable: `receive` returns the last frames, and then raises an error. A
    channel that was closed here, perhaps by another thread, is readable too.
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
