"""Which replicas run on this host, which are awaited from others, and where all of them meet."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from shoal import env
from shoal.addresses import Address, host_of, refuse_hidden_loopback
from shoal.config.engine_options import EngineOptions, HostOptions
from shoal.errors import ConfigError
from shoal.transport.rendezvous import require_key
from shoal.wire.plan import ReplicaPlace

DEFAULT_PORT = 29550


class Mode(Enum):
    ALONE = "all replicas are here"
    HEAD = "others run replicas for the front end that is here"
    HEADLESS = "the front end is elsewhere"
    PEERS = "each host serves its own replicas"


@dataclass(frozen=True, slots=True)
class Deployment:
    mode: Mode
    size: int  # replicas on all hosts
    local: Sequence[int]  # their numbers on this host
    address: Address | None = None  # where they meet; None: nobody else is there
    key: str = ""

    @classmethod
    def of(cls, options: EngineOptions) -> "Deployment":
        """
        Raises:
            ConfigError: options do not go together; the numbers are in it.
        """
        hosts, size = options.hosts, options.parallel.data_parallel_size
        mode = _mode(hosts, size)
        local = _local(hosts, mode, size)
        if mode is Mode.ALONE or (len(local) == size and mode is not Mode.HEADLESS):
            return cls(Mode.ALONE, size, range(size))
        if options.parallel.distributed_executor_backend == "threads":
            raise ConfigError(
                "--distributed-executor-backend threads: replicas on several hosts are processes; leave it out"
            )
        if hosts.data_parallel_address is None:
            raise ConfigError(
                f"{_summary(mode, local, size)}, and nothing says where they meet: give all of them the same "
                "--data-parallel-address, an address of the host that "
                + ("has replica 0" if mode is Mode.PEERS else "serves")
            )
        host = host_of(hosts.data_parallel_address, "--data-parallel-address")
        refuse_hidden_loopback(host, "--data-parallel-address")
        address = Address(host, hosts.data_parallel_rpc_port or DEFAULT_PORT)
        key = env.cluster_key()
        require_key(key, address.host)
        return cls(mode, size, local, address, key)

    @property
    def awaited(self) -> Sequence[int]:
        """Replicas that other hosts start for the front end here."""
        return [number for number in range(self.size) if number not in self.local] if self.mode is Mode.HEAD else []

    @property
    def elsewhere(self) -> Sequence[int]:
        """Replicas that other hosts serve on their own."""
        return [number for number in range(self.size) if number not in self.local] if self.mode is Mode.PEERS else []

    @property
    def listens(self) -> bool:
        """Do the others come to this process?"""
        return self.mode is Mode.HEAD or (self.mode is Mode.PEERS and 0 in self.local)

    @property
    def place(self) -> ReplicaPlace:
        """Of the first replica here. Without any (`local_size` 0) it is that of one elsewhere, by which prompts are
        checked."""
        if self.mode is Mode.ALONE:
            return ReplicaPlace(size=self.size, local_size=self.size)
        return ReplicaPlace(self.local[0] if self.local else 0, self.size, local_size=len(self.local))


def _mode(hosts: HostOptions, size: int) -> Mode:
    number, start = hosts.data_parallel_rank, hosts.data_parallel_start_rank
    if hosts.headless and hosts.data_parallel_hybrid_lb:
        raise ConfigError("--headless serves nothing, --data-parallel-hybrid-lb serves on every host: choose one")
    if number is not None and hosts.data_parallel_hybrid_lb:
        raise ConfigError(
            f"--data-parallel-rank {number} serves one replica, --data-parallel-hybrid-lb all of this host: choose one"
        )
    if number is not None and number >= size:
        raise ConfigError(f"--data-parallel-rank {number} of --data-parallel-size {size} does not exist: count from 0")
    if number is not None and start not in (None, number):
        raise ConfigError(f"--data-parallel-rank {number} and --data-parallel-start-rank {start}: leave one out")
    if number is not None and hosts.data_parallel_size_local not in (None, 1):
        raise ConfigError(
            f"--data-parallel-rank {number} is one replica, --data-parallel-size-local says "
            f"{hosts.data_parallel_size_local}: use --data-parallel-start-rank for several"
        )
    if hosts.headless:
        return Mode.HEADLESS
    if number is not None or hosts.data_parallel_hybrid_lb:
        return Mode.PEERS
    if start:
        raise ConfigError(
            f"--data-parallel-start-rank {start}: say too whether this host serves nothing (--headless) or its own "
            "replicas (--data-parallel-hybrid-lb); the front end's replicas are the first ones"
        )
    return Mode.ALONE if hosts.data_parallel_size_local is None else Mode.HEAD


def _local(hosts: HostOptions, mode: Mode, size: int) -> Sequence[int]:
    if hosts.data_parallel_rank is not None:
        return range(hosts.data_parallel_rank, hosts.data_parallel_rank + 1)
    first, count = hosts.data_parallel_start_rank, hosts.data_parallel_size_local
    if mode is Mode.HEADLESS and first is None:
        if size > 1:
            raise ConfigError(
                f"--headless: say which of the {size} replicas run here, with --data-parallel-start-rank and "
                "--data-parallel-size-local"
            )
        first = 0
    first = first or 0
    if first >= size:
        raise ConfigError(
            f"--data-parallel-start-rank {first} of --data-parallel-size {size} does not exist: count from 0"
        )
    count = size - first if count is None else count
    if first + count > size:
        raise ConfigError(
            f"--data-parallel-start-rank {first} and --data-parallel-size-local {count} reach up to replica "
            f"{first + count - 1}, --data-parallel-size is {size}: lower them, or give all hosts a larger size"
        )
    if count == 0 and mode is not Mode.HEAD:
        raise ConfigError("--data-parallel-size-local 0: nothing is left to do here; only a front end may say 0")
    return range(first, first + count)


def _summary(mode: Mode, local: Sequence[int], size: int) -> str:
    if mode is Mode.HEADLESS:
        return f"--headless: the front end of the {size} replica{'s' if size > 1 else ''} is elsewhere"
    return f"{len(local)} of {size} replicas are here, the others elsewhere"
