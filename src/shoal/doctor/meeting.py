"""Where the doctors of several hosts meet, and exchange what they found.

`Peers` is the seam: whoever starts a doctor on each host in another way gives another implementation of it to
`runs.examine_together`.
"""

import time
from typing import Protocol

from shoal.addresses import Address, join_host_port
from shoal.doctor.settings import Settings
from shoal.errors import EngineError
from shoal.transport.rendezvous import Rendezvous
from shoal.transport.room_member import RoomMember
from shoal.wire.credentials import Credentials

_ROOM = "doctor"
_PROTOCOL = "1"  # of what the doctors exchange; it changes less often than Shoal's version
_GOODBYE_S = 10.0


class Peers(Protocol):
    """The doctors of all hosts, as one of them sees them."""

    rank: int
    size: int
    address: str  # of this host, at which the others reach it
    rendezvous: str  # host:port of a rendezvous whose store all hosts reach; "": there is none, and no all-reduce
    credentials: Credentials  # of this host, for that rendezvous

    def exchange(self, topic: str, payload: bytes, timeout_s: float) -> dict[int, bytes]:
        """Give a payload to all, and return the payloads of all by rank, without those that did not come in time."""

    def close(self) -> None:
        """Leave, after the others have got everything."""


class RoomPeers:
    """Doctors that meet in a room of a rendezvous."""

    def __init__(self, settings: Settings, credentials: Credentials, *, opens: bool = False) -> None:
        """Wait for all hosts.

        Args:
            opens: open the rendezvous here; else it is open, or another host opens it.

        Raises:
            ConfigError: the rendezvous cannot be opened or reached, or not all hosts have come in time.
            EngineError: the connection has ended.
        """
        self.rank, self.size, self.credentials = settings.node_rank, settings.nnodes, credentials
        self.rendezvous = join_host_port(settings.master, settings.master_port)
        self._server: Rendezvous | None = None
        if opens:
            self._server = Rendezvous(settings.master, settings.master_port, credentials=credentials)
        try:
            self._member = RoomMember(
                Address(settings.master, settings.master_port),
                credentials,
                room=_ROOM,
                rank=settings.node_rank,
                size=settings.nnodes,
                agreement={"protocol of the doctors": _PROTOCOL},
                timeout=settings.timeout_s,
            )
        except BaseException:
            if self._server is not None:
                self._server.close()
            raise
        self.address = self._member.host_address

    def exchange(self, topic: str, payload: bytes, timeout_s: float) -> dict[int, bytes]:
        found, deadline = {self.rank: payload}, time.monotonic() + timeout_s
        try:
            self._member.post(topic, payload)
        except EngineError:
            return found
        for rank in range(self.size):
            if rank != self.rank:
                try:
                    left = max(deadline - time.monotonic(), 0.0)
                    found[rank] = self._member.await_post(topic, rank, timeout=left)
                except EngineError:  # this host has gone, or is late: the others may still have posted
                    continue
        return found

    def close(self) -> None:
        """Leave. The host that has opened the rendezvous waits for the others first: their messages go through it."""
        self.exchange("goodbye", b"", _GOODBYE_S if self._server is not None else 0.0)
        self._member.close()
        if self._server is not None:
            self._server.close()
