"""Requests to the grammar host to fork a process, each with the file descriptor of that process's channel."""

import socket

from shoal.transport.channel import ChannelClosed

_NUMBER_BYTES = 8  # a process's number, sent together with the descriptor


class ForkRequests:
    """The host's end of the socket on which fork requests arrive. `channel.wait` can wait for it."""

    backlog = False  # as `channel.wait` expects: nothing is ever waiting to be sent

    def __init__(self, fork_socket: socket.socket) -> None:
        self._socket = fork_socket

    def fileno(self) -> int:
        return self._socket.fileno()

    def receive(self) -> tuple[int, int]:
        """Return the number of the process to fork, and the descriptor of its end of the channel.

        Raises:
            ChannelClosed: the other end is closed.
        """
        data, fds, _, _ = socket.recv_fds(self._socket, _NUMBER_BYTES, 1)
        if not data:
            raise ChannelClosed("end of file")
        return int.from_bytes(data, "little"), fds[0]

    def close(self) -> None:
        self._socket.close()


def request_fork(fork_socket: socket.socket, number: int, fd: int) -> None:
    """Ask the host to fork a process with this number, which is to use `fd` as its channel."""
    socket.send_fds(fork_socket, [number.to_bytes(_NUMBER_BYTES, "little")], [fd])
