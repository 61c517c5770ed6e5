"""The leader of the nodes of a deployment: it awaits them, plans replicas over them, and sends them to engines."""

from collections.abc import Callable

from shoal.errors import UserError
from shoal.launch.deployment import NodeGroup
from shoal.launch.followers import Followers, NoFollowers
from shoal.launch.host_network import leader_address, warn_of_kernel_ports
from shoal.launch.node_pool import NodePool
from shoal.launch.open_model import OpenModel, log_plan
from shoal.transport.rendezvous import Rendezvous
from shoal.wire.base import replace_fields
from shoal.wire.calls import FOLLOWERS_DOOR
from shoal.wire.plan import EnginePlan, ReplicaPlace
from shoal.wire.rendezvous import NODES_DOOR


class Leader:
    """The leader of a group of nodes. `rendezvous` is the address where they come, and where replicas meet."""

    def __init__(self, model: OpenModel, group: NodeGroup, followers: Followers | None = None) -> None:
        """Listen for nodes. `followers`: those of this process, which come to the same address.

        Raises:
            ConfigError: this host does not have the address, the port is in use, or variables contradict the address.
        """
        self._model = model
        self._group = group
        self._pool = NodePool(group, model.agreement)
        where = group.address
        self._own_address = leader_address(where.host, "--master-addr")
        warn_of_kernel_ports(model.options)
        doors = {NODES_DOOR: self._pool, FOLLOWERS_DOOR: followers or NoFollowers()}
        self._rendezvous = Rendezvous(where.host, where.port, key=group.key, doors=doors, reopen_rooms=True)
        self.rendezvous = str(where)
        self.key = group.key
        self._logged = False

    def plan(self, place: ReplicaPlace, timeout: float, cancelled: Callable[[], bool] = lambda: False) -> EnginePlan:
        """Wait for the nodes of a replica, and return its plan.

        Raises:
            UserError: they do not come in time, or do not fit together with the options and the model.
            EngineError: `cancelled` returned True.
        """
        numbers = self._group.of_replica(place.rank)
        nodes = self._pool.gather([number for number in numbers if number], timeout, cancelled)
        place = replace_fields(
            place,
            local_rank=0,
            local_size=1,
            address=self._own_address,
            ports=self._model.options.nodes.port_range,
            key=self._group.key,
        )
        hosts = [(nodes[n].address, nodes[n].report) if n else (self._own_address, None) for n in numbers]
        plan = self._model.plan_over(place, hosts)
        if not self._logged:
            self._logged = True
            log_plan(plan)
        return plan

    def call(self, replica: int, address: str, start: str) -> None:
        """Send the nodes of a replica to its engine, which awaits them at an address."""
        self._pool.call(self._group.of_replica(replica), replica, address, start)

    def dismiss(self, error: Exception | None = None) -> None:
        """End all nodes, and stop listening. `error`: the reason, if the work is not done. Idempotent."""
        self._pool.dismiss("" if error is None else str(error), user_error=isinstance(error, UserError))
        self._rendezvous.close()

    def close(self) -> None:
        """Stop listening. The nodes wait for the next leader. Idempotent."""
        self._pool.close()
        self._rendezvous.close()
