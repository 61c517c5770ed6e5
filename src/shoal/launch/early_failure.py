"""What the hosts of a replica tell each other if one of them fails before they have met (`--nnodes`).

Without this, the others would wait for that host until --start-timeout.
"""

import dataclasses
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from shoal import env
from shoal.addresses import Address, parse_host
from shoal.config.engine_options import ClusterTlsOptions, EngineOptions
from shoal.errors import ConfigError, ShoalError
from shoal.launch.credentials import credentials_of_host
from shoal.launch.deployment import NodeGroup
from shoal.log import get_logger
from shoal.transport.channel import Channel
from shoal.transport.connecting import RefusedUnknown, report_failure
from shoal.transport.rendezvous import Rendezvous
from shoal.wire.calls import FOLLOWERS_DOOR
from shoal.wire.credentials import Credentials
from shoal.wire.rendezvous import NODES_DOOR, Hello, JoinRefused

log = get_logger("node")

_TELL_LEADER_S = 10.0  # for how long a node tries to reach the leader, which may still be reading the model
_TELL_NODES_S = 3.0  # for how long a leader awaits its nodes, which try to reach it five times a second
_TELL_REFUSAL_S = 2.0  # ... if it has answered before
_TELL_INTERRUPT_S = 1.0  # ... if the user has interrupted this process
_NEEDED = ("nnodes", "node_rank", "master_addr", "master_port", "spare_hosts")


@dataclass(frozen=True, slots=True)
class _Place:
    """The place of this host among those of a replica."""

    rank: int
    size: int
    spares: int
    address: Address  # where the hosts meet
    credentials: Credentials

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "_Place | None":
        """Read the place from the options that the user gave, of which others may be wrong; None: there is none."""
        needed = {*_NEEDED, *(field.name for field in dataclasses.fields(ClusterTlsOptions))}
        try:
            options = EngineOptions.from_flat(None, {name: each for name, each in given.items() if name in needed})
            nodes = options.nodes
            if nodes.nnodes == 1 or nodes.master_addr is None:
                return None
            address = Address(parse_host(nodes.master_addr, "--master-addr"), nodes.master_port)
            credentials = _credentials(options.tls) if nodes.node_rank else credentials_of_host(options.tls)
        except ConfigError:
            return None
        return cls(nodes.node_rank, nodes.nnodes, nodes.spare_hosts, address, credentials)


def _credentials(options: ClusterTlsOptions) -> Credentials:
    """Return the credentials of this host; only the key, if the files for TLS are what is wrong.

    Raises:
        ConfigError: the key cannot be read.
    """
    try:
        return credentials_of_host(options)
    except ConfigError:
        return Credentials(env.cluster_key())


@contextmanager
def told_to_other_hosts(given: Mapping[str, Any]) -> Iterator[None]:
    """Tell the other hosts of a replica if this block raises an error, since they wait for this host.

    Args:
        given: the options that the user gave.
    """
    try:
        yield
    except Exception as error:
        why = str(error) if isinstance(error, ShoalError) else f"{type(error).__name__}: {error}"
        _tell(given, why, _TELL_LEADER_S)
        raise
    except KeyboardInterrupt:
        _tell(given, "it was interrupted", _TELL_INTERRUPT_S)
        raise


def report_refusal(group: NodeGroup, error: RefusedUnknown) -> None:
    """Tell the leader that this node cannot join, since both do not agree on TLS. Never raises."""
    _report(group.address, Credentials(group.credentials.key), group.rank, group.size, str(error), _TELL_REFUSAL_S)


def _tell(given: Mapping[str, Any], why: str, patience: float) -> None:
    place = _Place.of(given)
    if place is None:
        return
    if place.rank:
        log.error("%s (node 0 at %s is told, which may take up to %g s)", why, place.address, patience)
        _report(place.address, place.credentials, place.rank, place.size, why, patience)
        return
    patience = min(patience, _TELL_NODES_S)
    log.error("%s (the other hosts are told, which may take up to %g s)", why, patience)
    _refuse_nodes(place, why, patience)


def _report(address: Address, credentials: Credentials, rank: int, size: int, why: str, patience: float) -> None:
    report_failure(address, credentials, room=NODES_DOOR, rank=rank, size=size, why=why, timeout=patience)


class _ClosedDoor:
    """The door of a leader that has failed: all who come learn the reason."""

    def __init__(self, why: str, awaited: int) -> None:
        self.all_told = threading.Event()
        self._why = why
        self._awaited = awaited
        self._told: set[int] = set()

    def objection(self, hello: Hello) -> JoinRefused:
        self._told.add(hello.rank)
        if len(self._told) >= self._awaited:
            self.all_told.set()
        return JoinRefused(self._why)

    def enter(self, hello: Hello, channel: Channel) -> None:
        channel.close()


def _refuse_nodes(place: _Place, why: str, patience: float) -> None:
    door = _ClosedDoor(f"node 0 ({socket.gethostname()}) cannot lead: {why}", place.size - 1 + place.spares)
    doors = {NODES_DOOR: door, FOLLOWERS_DOOR: door}
    address = place.address
    try:
        with Rendezvous(address.host, address.port, credentials=place.credentials, doors=doors):
            door.all_told.wait(patience)
    except ConfigError:  # this host cannot listen there
        pass
