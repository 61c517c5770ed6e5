"""The node of a replica as a Ray actor."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shoal.addresses import Address
from shoal.errors import EngineError
from shoal.launch.credentials import credentials_of_host
from shoal.launch.deployment import NodeGroup
from shoal.launch.headless import introduce_host
from shoal.launch.node import Node
from shoal.launch.open_model import read_options
from shoal.lazy import load
from shoal.log import configure_logging, get_logger
from shoal.process.stop_event import StopEvent
from shoal.wire.base import replace_fields

log = get_logger("ray")


@dataclass(frozen=True, slots=True)
class NodeOrder:
    """Everything that an actor must know to be a node."""

    model: str | None
    options: Mapping[str, Any]  # the engine options that the user gave
    number: int  # of the node
    size: int  # how many nodes there are, and the leader
    ranks: int  # how many ranks its resources are for
    leader: str  # host:port where the leader awaits its nodes
    key: str  # the shared key
    online: bool


class NodeActor:
    """A node of a replica. Ray starts it on a host, with the resources of its ranks."""

    def __init__(self, order: NodeOrder) -> None:
        self._order = order
        self._stop = StopEvent()
        self._running = threading.Lock()
        configure_logging(f"(node {order.number}) ")

    def run(self) -> None:
        """Run the ranks of this node until the leader dismisses it, or `stop` is called.

        Raises:
            UserError: this node cannot work here, or the leader refuses it.
        """
        order = self._order
        # Ray counts CPUs, and does not bind processes to them; of GPUs it shows this process those of its ranks.
        given = {**order.options, "num_devices": order.ranks}
        options, read = read_options(order.model, given, online=order.online)
        leader = Address.parse(order.leader)
        report, agreement = introduce_host(options, read, leader.host)
        if not report.address:  # SHOAL_HOST_IP is not set on this host
            report = replace_fields(report, address=str(load("ray.util:get_node_ip_address")()))
        credentials = credentials_of_host(options.tls, order.key)
        group = NodeGroup(order.size, order.number, 1, leader, credentials, leader_has_ranks=False)
        with self._running:
            node = Node(group, options, report, agreement, self._stop)
            try:
                node.join()
                node.obey_leaders(online=False)
            except EngineError as error:  # the leader has failed or gone, and knows why
                log.info("this node ends: %s", error)
            finally:
                node.close()

    def stop(self) -> None:
        """End the ranks of this node, and wait until they have ended."""
        self._stop.set()
        with self._running:
            pass
