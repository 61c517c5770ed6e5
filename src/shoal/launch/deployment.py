"""The deployment over hosts: which replicas or ranks run here, which elsewhere, and where all of them meet."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from shoal.addresses import Address, parse_host, refuse_loopback_name
from shoal.config.engine_options import EngineOptions, HostOptions
from shoal.errors import ConfigError
from shoal.executors.table import EXECUTORS
from shoal.launch.credentials import credentials_of_host
from shoal.launch.host_network import check_ports
from shoal.transport.rendezvous import require_key
from shoal.values import numbered
from shoal.wire.credentials import NO_CREDENTIALS, Credentials
from shoal.wire.plan import ReplicaPlace

DEFAULT_PORT = 29550


class Mode(Enum):
    """The role of this process among the hosts of a deployment."""

    ALONE = "all replicas run on this host"
    HEAD = "the front end runs here, and other hosts run replicas for it"
    HEADLESS = "replicas run here, for a front end on another host"
    PEERS = "each host serves its own replicas"


@dataclass(frozen=True, slots=True)
class NodeGroup:
    """The nodes of a deployment whose replicas have several hosts each (`--nnodes`), seen from this host."""

    size: int  # nodes of all replicas, and the leader
    rank: int  # the number of this host; number 0 leads
    replicas: int
    address: Address  # where node 0 awaits the others
    credentials: Credentials  # of this host
    leader_has_ranks: bool = True  # False: the host of the leader is no node, only its number is used
    spares: int = 0  # nodes that wait to take the place of one that is gone; their numbers come after the others

    @property
    def per_replica(self) -> int:
        return (self.size - (not self.leader_has_ranks)) // self.replicas

    def of_replica(self, number: int) -> range:
        """Return the numbers of the nodes of a replica, which may have been added later."""
        first = number * self.per_replica + (not self.leader_has_ranks)
        return range(first, first + self.per_replica)

    @classmethod
    def of(cls, options: EngineOptions, key: str | None = None) -> "NodeGroup | None":
        """Return the group that the options describe; None if each replica runs on one host.

        Args:
            key: the shared key; None: the one in the environment.

        Raises:
            ConfigError: options contradict each other.
        """
        nodes, replicas = options.nodes, options.parallel.data_parallel_size
        if nodes.node_rank >= nodes.nnodes + nodes.spare_hosts:
            spares = f" and --spare-hosts {nodes.spare_hosts}" if nodes.spare_hosts else ""
            raise ConfigError(
                f"--node-rank {nodes.node_rank} does not exist with --nnodes {nodes.nnodes}{spares}: ranks count from 0"
            )
        if nodes.nnodes == 1:
            if nodes.spare_hosts:
                raise ConfigError("--spare-hosts replace a host of several: give --nnodes too")
            return None
        _check_layout_of_nodes(options)
        if nodes.master_addr is None:
            raise ConfigError(
                f"--nnodes {nodes.nnodes} needs --master-addr: give all hosts the same address, one of the host with "
                "--node-rank 0"
            )
        host = parse_host(nodes.master_addr, "--master-addr")
        refuse_loopback_name(host, "--master-addr")
        address = Address(host, nodes.master_port)
        credentials = credentials_of_host(options.tls, key)
        check_ports(options, "--master-port", nodes.master_port, 1 if nodes.node_rank else 1 + replicas)
        return cls(nodes.nnodes, nodes.node_rank, replicas, address, credentials, spares=nodes.spare_hosts)


def _flags_of_whole_replicas(hosts: HostOptions) -> list[str]:
    """Return the given flags that place whole replicas on hosts."""
    values = {
        "--data-parallel-size-local": hosts.data_parallel_size_local,
        "--data-parallel-start-rank": hosts.data_parallel_start_rank,
        "--data-parallel-rank": hosts.data_parallel_rank,
        "--data-parallel-address": hosts.data_parallel_address,
        "--data-parallel-hybrid-lb": hosts.data_parallel_hybrid_lb or None,
    }
    return [flag for flag, value in values.items() if value is not None]


def _check_no_hosts(options: EngineOptions) -> None:
    given = _flags_of_whole_replicas(options.hosts) + (["--headless"] if options.hosts.headless else [])
    if given:
        raise ConfigError(f"Ray places all replicas, but {given[0]} places some of them by hand: leave one of them out")


def _check_layout_of_nodes(options: EngineOptions) -> None:
    nodes, hosts, parallel = options.nodes, options.hosts, options.parallel
    ranks, replicas = parallel.tensor_parallel_size * parallel.pipeline_parallel_size, parallel.data_parallel_size
    if parallel.distributed_executor_backend == "ray":
        raise ConfigError(
            f"--nnodes {nodes.nnodes} and --distributed-executor-backend ray: Ray places ranks itself; leave one out"
        )
    if given := _flags_of_whole_replicas(hosts):
        raise ConfigError(
            f"--nnodes {nodes.nnodes} spreads each replica over hosts, but {given[0]} places whole replicas on hosts: "
            "leave one of them out"
        )
    if hosts.headless and nodes.node_rank == 0:
        raise ConfigError("--headless: the host with --node-rank 0 leads and serves; only the others may be headless")
    if nodes.nnodes % replicas:
        raise ConfigError(
            f"--nnodes {nodes.nnodes} cannot be divided among --data-parallel-size {replicas} replicas: use a "
            "multiple; for whole replicas on each host, use --data-parallel-size-local and --data-parallel-address"
        )
    if ranks < nodes.nnodes // replicas:
        raise ConfigError(
            f"--nnodes {nodes.nnodes} is more than the layout needs: a replica has {numbered(ranks, 'rank')}; lower "
            "--nnodes, or raise --tensor-parallel-size or --pipeline-parallel-size"
        )


@dataclass(frozen=True, slots=True)
class Deployment:
    """The replicas of all hosts, seen from this one."""

    mode: Mode
    size: int  # the number of replicas on all hosts
    local: Sequence[int]  # the numbers of the replicas on this host
    address: Address | None = None  # of the rendezvous; None: there is no other host
    credentials: Credentials = NO_CREDENTIALS  # of this host, for the rendezvous
    nodes: NodeGroup | None = None  # the hosts that share the ranks of each replica; None: each replica is on one host
    by_ray: bool = False  # the ranks of all replicas run where Ray places them

    @classmethod
    def of(cls, options: EngineOptions, key: str | None = None) -> "Deployment":
        """Return the deployment that the options describe.

        Args:
            key: the shared key of hosts that share the ranks of a replica; None: the one in the environment.

        Raises:
            ConfigError: options contradict each other.
        """
        hosts, size = options.hosts, options.parallel.data_parallel_size
        nodes = NodeGroup.of(options, key)
        if nodes is not None:
            return cls(Mode.ALONE, size, range(size), nodes=nodes)
        if options.parallel.distributed_executor_backend == "ray":
            _check_no_hosts(options)
            return cls(Mode.ALONE, size, range(size), by_ray=True)
        mode = _mode(hosts, size)
        local = _local(hosts, mode, size)
        if mode is Mode.ALONE or (len(local) == size and mode is not Mode.HEADLESS):
            return cls(Mode.ALONE, size, range(size))
        backend = options.parallel.distributed_executor_backend
        if backend in EXECUTORS and EXECUTORS[backend].replicas_are_threads:
            raise ConfigError(
                f"--distributed-executor-backend {backend}: replicas on several hosts must be processes; leave it out"
            )
        if hosts.data_parallel_address is None:
            raise ConfigError(
                f"{_summary(mode, local, size)}, and --data-parallel-address is missing: give it the same value on all "
                "hosts, an address of the host that " + ("has replica 0" if mode is Mode.PEERS else "serves")
            )
        host = parse_host(hosts.data_parallel_address, "--data-parallel-address")
        refuse_loopback_name(host, "--data-parallel-address")
        address = Address(host, hosts.data_parallel_rpc_port or DEFAULT_PORT)
        credentials = credentials_of_host(options.tls)
        require_key(credentials.key, address.host)
        check_ports(options, "--data-parallel-rpc-port", address.port, 1)
        return cls(mode, size, local, address, credentials)

    @property
    def awaited(self) -> Sequence[int]:
        """The numbers of the replicas that other hosts start for the front end on this host."""
        return [number for number in range(self.size) if number not in self.local] if self.mode is Mode.HEAD else []

    @property
    def served_elsewhere(self) -> Sequence[int]:
        """The numbers of the replicas that other hosts serve themselves."""
        return [number for number in range(self.size) if number not in self.local] if self.mode is Mode.PEERS else []

    @property
    def listens(self) -> bool:
        """True if this process opens the rendezvous, and the other hosts connect to it."""
        return self.mode is Mode.HEAD or (self.mode is Mode.PEERS and 0 in self.local)

    @property
    def place(self) -> ReplicaPlace:
        """The place of the first replica on this host.

        If there is none (`local_size` is 0), it is the place of replica 0 on another host, because checking prompts
        needs some plan. The same holds for a replica over several hosts, which are not known yet.
        """
        if self.nodes is not None or self.by_ray:
            return ReplicaPlace(size=self.size, local_size=0)
        if self.mode is Mode.ALONE:
            return ReplicaPlace(size=self.size, local_size=self.size)
        return ReplicaPlace(self.local[0] if self.local else 0, self.size, local_size=len(self.local))


def place_of(size: int, number: int, local: Sequence[int] | None = None) -> ReplicaPlace:
    """Return the place of one replica.

    Args:
        size: the number of replicas that were planned.
        number: the number of the replica. One that was not planned belongs to a replica that was added later.
        local: the numbers of the replicas on this host; None: all replicas are here.
    """
    size = max(size, number + 1)
    if local is None or len(local) == size:
        return ReplicaPlace(number, size, local_rank=number, local_size=size)
    position = local.index(number) if number in local else len(local)
    return ReplicaPlace(number, size, local_rank=position, local_size=max(len(local), position + 1))


def _mode(hosts: HostOptions, size: int) -> Mode:
    number, start = hosts.data_parallel_rank, hosts.data_parallel_start_rank
    if hosts.headless and hosts.data_parallel_hybrid_lb:
        raise ConfigError(
            "--headless does not serve, but --data-parallel-hybrid-lb serves on every host: choose one of them"
        )
    if number is not None and hosts.data_parallel_hybrid_lb:
        raise ConfigError(
            f"--data-parallel-rank {number} serves one replica, but --data-parallel-hybrid-lb serves all replicas of "
            "this host: choose one of them"
        )
    if number is not None and number >= size:
        raise ConfigError(
            f"--data-parallel-rank {number} does not exist with --data-parallel-size {size}: ranks count from 0"
        )
    if number is not None and start not in (None, number):
        raise ConfigError(f"--data-parallel-rank {number} and --data-parallel-start-rank {start}: leave one out")
    if number is not None and hosts.data_parallel_size_local not in (None, 1):
        raise ConfigError(
            f"--data-parallel-rank {number} is one replica, but --data-parallel-size-local is "
            f"{hosts.data_parallel_size_local}: use --data-parallel-start-rank for several replicas"
        )
    if hosts.headless:
        return Mode.HEADLESS
    if number is not None or hosts.data_parallel_hybrid_lb:
        return Mode.PEERS
    if start:
        raise ConfigError(
            f"--data-parallel-start-rank {start} needs --headless (the front end is elsewhere) or "
            "--data-parallel-hybrid-lb (this host serves its own replicas); a front end's own replicas start at rank 0"
        )
    return Mode.ALONE if hosts.data_parallel_size_local is None else Mode.HEAD


def _local(hosts: HostOptions, mode: Mode, size: int) -> Sequence[int]:
    if hosts.data_parallel_rank is not None:
        return range(hosts.data_parallel_rank, hosts.data_parallel_rank + 1)
    first, count = hosts.data_parallel_start_rank, hosts.data_parallel_size_local
    if mode is Mode.HEADLESS and first is None:
        if size > 1:
            raise ConfigError(
                f"--headless: use --data-parallel-start-rank and --data-parallel-size-local to say which of the {size} "
                "replicas run here"
            )
        first = 0
    first = first or 0
    if first >= size:
        raise ConfigError(
            f"--data-parallel-start-rank {first} does not exist with --data-parallel-size {size}: ranks count from 0"
        )
    count = size - first if count is None else count
    if first + count > size:
        raise ConfigError(
            f"--data-parallel-start-rank {first} and --data-parallel-size-local {count} reach up to replica "
            f"{first + count - 1}, but --data-parallel-size is {size}: lower them, or raise --data-parallel-size on "
            "all hosts"
        )
    if count == 0 and mode is not Mode.HEAD:
        raise ConfigError("--data-parallel-size-local 0: this host would have no replicas; only a front end may say 0")
    return range(first, first + count)


def _summary(mode: Mode, local: Sequence[int], size: int) -> str:
    if mode is Mode.HEADLESS:
        return f"--headless: the front end of the {size} replica{'s' if size > 1 else ''} is elsewhere"
    return f"{len(local)} of {size} replicas run here, the others elsewhere"
