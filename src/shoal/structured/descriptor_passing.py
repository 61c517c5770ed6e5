"""How a host gets the channels of the processes that it forks: descriptors that cross between processes."""

import socket

from shoal.transport.channel import ChannelClosed

_NUMBER = 8  # bytes of a process's number, which come with the descriptor


class DescriptorReceiver:
    """The host's end; one of the things that `channel.wait` waits for."""

    backlog = False

    def __init__(self, door: socket.socket) -> None:
        self._socket = door

    def fileno(self) -> int:
        return self._socket.fileno()

    def receive(self) -> tuple[int, int]:
        """
        Raises:
            ChannelClosed: nobody is there any more.
        """
        data, fds, _, _ = socket.recv_fds(self._socket, _NUMBER, 1)
        if not data:
            raise ChannelClosed("end of file")
        return int.from_bytes(data, "little"), fds[0]

    def close(self) -> None:
        self._socket.close()


def send_through_door(door: socket.socket, number: int, fd: int) -> None:
    """Has the host fork a process with this number, whose channel ends at `fd`."""
    socket.send_fds(door, [number.to_bytes(_NUMBER, "little")], [fd])
