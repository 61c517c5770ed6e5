"""The leader of the nodes of a deployment: it awaits them, plans replicas over them, and sends them to engines."""

import functools
import socket
from collections.abc import Callable, Mapping
from typing import Protocol

from shoal.errors import UserError
from shoal.launch.credentials import log_protection
from shoal.launch.deployment import NodeGroup
from shoal.launch.followers import Followers, NoFollowers
from shoal.launch.host_network import leader_address, warn_of_kernel_ports
from shoal.launch.measured_links import measure_links
from shoal.launch.node_pool import NodePool, WaitingNode
from shoal.launch.open_model import OpenModel, log_plan
from shoal.lazy import load
from shoal.planner.host_links import Measured
from shoal.transport.rendezvous import Rendezvous
from shoal.wire.base import replace_fields
from shoal.wire.calls import FOLLOWERS_DOOR
from shoal.wire.plan import EnginePlan, ReplicaPlace
from shoal.wire.rendezvous import NODES_DOOR
from shoal.wire.topology import HostTopology


class NodeStarter(Protocol):
    """Starts nodes elsewhere, where nobody starts them by hand."""

    group: NodeGroup

    def start(self, replica: int, leader: str, timeout: float, cancelled: Callable[[], bool]) -> None:
        """Start the nodes of a replica, if they do not run. They come to `leader`, host:port.

        Raises:
            ConfigError: they cannot be started within `timeout` seconds.
            EngineError: `cancelled` returned True.
        """

    def check(self, replica: int) -> None:
        """Check that no node of a replica has given up.

        Raises:
            ShoalError: one has; the error is its own.
        """

    def describe(self, replica: int) -> str:
        """Return the state of the nodes of a replica that have not come, for messages."""

    def release(self, replica: int) -> None:
        """End the nodes of a replica. Idempotent, never raises."""

    def close(self) -> None:
        """End all nodes. Idempotent, never raises."""


def make_leader(model: OpenModel, followers: Followers | None = None) -> "Leader | None":
    """Return the leader of the nodes of a model; None if each replica is on this host, or on one headless host.

    Args:
        followers: see `Leader`.

    Raises:
        ConfigError: the nodes cannot be started with these options, or this host cannot listen for them.
    """
    if model.options.parallel.distributed_executor_backend == "ray":
        nodes: NodeStarter = load("shoal.launch.ray.ray_nodes:RayNodes")(model)
        return Leader(model, nodes.group, nodes)
    group = model.node_group
    return None if group is None else Leader(model, group, followers=followers)


class Leader:
    """The leader of a group of nodes. `rendezvous` is the address where they come, and where replicas meet."""

    def __init__(
        self,
        model: OpenModel,
        group: NodeGroup,
        starter: NodeStarter | None = None,
        followers: Followers | None = None,
    ) -> None:
        """Listen for nodes.

        Args:
            starter: starts the nodes of a replica when it is planned; None: they are started by hand.
            followers: those of this process, which come to the same address; None: it has none.

        Raises:
            ConfigError: this host does not have the address, the port is in use, or variables contradict the address.
        """
        self._model = model
        self._group = group
        self._starter = starter
        where = group.address
        log_protection(group.credentials, where.host)
        self._own_address = leader_address(where.host, "--master-addr")
        warn_of_kernel_ports(model.options)
        self._pool = NodePool(group, model.agreement)
        self._rendezvous = Rendezvous(
            where.host,
            where.port,
            credentials=group.credentials,
            ports=model.options.nodes.port_range,
            doors={NODES_DOOR: self._pool, FOLLOWERS_DOOR: followers or NoFollowers()},
            reopen_rooms=True,
        )
        self.rendezvous = self._rendezvous.address
        self._pool.address = self.rendezvous
        self.credentials = group.credentials
        self.num_replicas = group.replicas
        self._logged = False
        self._measured: dict[tuple[str, ...], Measured] = {}  # by the addresses of the hosts of a replica

    def plan(self, place: ReplicaPlace, timeout: float, cancelled: Callable[[], bool] = lambda: False) -> EnginePlan:
        """Wait for the nodes of a replica, and return its plan.

        Raises:
            UserError: they do not come in time, or do not fit together with the options and the model.
            EngineError: `cancelled` returned True.
        """
        numbers = self._group.of_replica(place.rank)
        advice: dict[str, Callable[[], str]] = {}
        if self._starter is not None:
            self._starter.start(place.rank, self.rendezvous, timeout, cancelled)
            cancelled = functools.partial(self._check_nodes, self._starter, place.rank, cancelled)
            advice = {"advice": functools.partial(self._starter.describe, place.rank)}
        try:
            nodes = self._pool.gather([number for number in numbers if number], timeout, cancelled, **advice)
        except UserError as error:
            if self.num_replicas == 1:  # nothing else can work, so the other nodes need not wait for the end of this
                self._pool.dismiss(str(error), user_error=True)
            raise
        place = replace_fields(
            place,
            local_rank=0,
            local_size=1,
            address=self._own_address,
            ports=self._model.options.nodes.port_range,
            credentials=self._group.credentials,
        )
        hosts = {n: (nodes[n].address, nodes[n].report) if n else (self._own_address, None) for n in numbers}
        plan = self._model.plan_over(place, hosts, self._measure({n: nodes.get(n) for n in numbers}))
        if not self._logged:
            self._logged = True
            log_plan(plan)
        return plan

    def _measure(self, nodes: Mapping[int, WaitingNode | None]) -> Measured | None:
        """Measure the links between the hosts of a replica, if that is asked for.

        A replica that is started again on the same hosts does not wait for that: it gets what was measured before.
        """
        if not self._model.options.nodes.measure_links or len(nodes) < 2:
            return None
        own = HostTopology(name=socket.gethostname(), address=self._own_address)
        addresses = tuple(own.address if node is None else node.address for node in nodes.values())
        if addresses not in self._measured:
            self._measured[addresses] = measure_links(self._pool, nodes, own)
        return self._measured[addresses]

    def _check_nodes(self, starter: NodeStarter, replica: int, cancelled: Callable[[], bool]) -> bool:
        starter.check(replica)
        return cancelled()

    def release(self, replica: int) -> None:
        """End the nodes of a replica that was taken out, unless they are started by hand. Idempotent, never raises."""
        if self._starter is not None:
            self._starter.release(replica)

    def call(self, replica: int, address: str, start: str) -> None:
        """Send the nodes of a replica to its engine, which awaits them at an address."""
        self._pool.call(self._group.of_replica(replica), replica, address, start)

    def dismiss(self, error: Exception | None = None) -> None:
        """End all nodes, and stop listening. `error`: the reason, if the work is not done. Idempotent."""
        self._pool.dismiss("" if error is None else str(error), user_error=isinstance(error, UserError))
        self._end()

    def close(self) -> None:
        """Stop listening. The nodes wait for the next leader. Idempotent."""
        self._pool.close()
        self._end()

    def _end(self) -> None:
        if self._starter is not None:
            self._starter.close()
        self._rendezvous.close()
