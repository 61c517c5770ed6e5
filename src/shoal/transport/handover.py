"""Channels that a process hands over to another process of its host.

The receiver has a socket with an abstract name, which can be reached within one network namespace only. So a process on
another host finds nobody under this name, and keeps its channel.
"""

import contextlib
import os
import secrets
import socket
import struct

from shoal.process.forks import close_in_children
from shoal.transport.channel import Channel

_CONNECT_S = 1.0
_NUMBER_BYTES = 8
_CREDENTIALS = struct.Struct("3i")  # the process, user and group at the other end, as SO_PEERCRED gives them


class ChannelReceiver:
    """The place where channels arrive, each with the number of the process that is at its other end."""

    def __init__(self) -> None:
        self.name = f"shoal-{secrets.token_hex(16)}"
        self._arrived: dict[int, Channel] = {}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        self._socket.bind(f"\0{self.name}")
        self._socket.listen(socket.SOMAXCONN)
        close_in_children(self)

    def close_in_child(self) -> None:
        self._socket.close()

    def take(self, pid: int) -> Channel | None:
        """Return the channel to this process if it was handed over, which is complete before `hand_over` returns."""
        with contextlib.suppress(BlockingIOError):
            while True:
                connection, _ = self._socket.accept()
                with connection:
                    self._receive(connection)
        return self._arrived.pop(pid, None)

    def _receive(self, connection: socket.socket) -> None:
        data, fds, _, _ = socket.recv_fds(connection, _NUMBER_BYTES, 1)
        if fds and not _is_own_user(connection):
            os.close(fds[0])
        elif fds:
            self._arrived[int.from_bytes(data, "little")] = Channel.from_fd(fds[0])

    def close(self) -> None:
        self._socket.close()
        for channel in self._arrived.values():
            channel.close()
        self._arrived = {}


def hand_over(channel: Channel, pid: int, receiver: str) -> bool:
    """Hand over the channel to the process `pid`, and close it here. Return False if that is impossible.

    It is impossible if the receiver is not on this host or belongs to another user, or if bytes of the channel were
    read or accepted here that would be lost.
    """
    if not channel.is_empty:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(_CONNECT_S)
        try:
            connection.connect(f"\0{receiver}")
            if not _is_own_user(connection):
                return False
            socket.send_fds(connection, [pid.to_bytes(_NUMBER_BYTES, "little")], [channel.fileno()])
        except OSError:
            return False
    channel.close()
    return True


def _is_own_user(connection: socket.socket) -> bool:
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return bool(_CREDENTIALS.unpack(found)[1] == os.geteuid())
