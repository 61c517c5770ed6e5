"""The processes of one program that torchrun has started (`--distributed-executor-backend external_launcher`).

The process with rank 0 leads. The processes of each other host are one node: the first of them starts the ranks of the
host, and all of them wait for the outputs. Options of nodes are made from what torchrun says, so that everything else
is as if the user had started the nodes.
"""

import itertools
import json
import secrets
import socket
from dataclasses import dataclass, field
from typing import Any

from shoal import env
from shoal.addresses import Address, refuse_loopback_name, reserve_port
from shoal.config.engine_options import EngineOptions
from shoal.devices import network
from shoal.errors import ConfigError
from shoal.launch.host_network import own_address
from shoal.lazy import load

EXTERNAL_LAUNCHER = "external_launcher"
_LOOPBACK = "127.0.0.1"
_KEY_BYTES = 32
_FLAG = f"--distributed-executor-backend {EXTERNAL_LAUNCHER}"

# The numbers of this process's jobs. All processes make the same models in the same order, so they count alike.
_jobs = itertools.count()


@dataclass(frozen=True, slots=True)
class TorchrunJob:
    """One `LLM` of the processes that torchrun has started, seen from one of them."""

    place: env.Torchrun
    address: Address  # where rank 0 listens
    key: str  # the shared key there
    hosts: tuple[range, ...]  # the ranks of each group of processes, which is on one host
    reserved: tuple[socket.socket, ...] = field(default=(), compare=False)  # keeps the port until rank 0 listens

    @classmethod
    def join(cls, options: EngineOptions) -> "TorchrunJob":
        """Meet the other processes, and agree with them on an address and a key.

        Raises:
            ConfigError: the options do not fit the processes, or not all of them come in time.
        """
        place = env.torchrun()
        if place is None:
            raise ConfigError(
                f"{_FLAG} is for programs that torchrun starts, but RANK and WORLD_SIZE are not set: start this one "
                "with torchrun --nproc-per-node N program.py, or leave the option out"
            )
        _check(options, place)
        address = _address(place) if place.num_groups > 1 else _LOOPBACK
        env.set_defaults({"GLOO_SOCKET_IFNAME": network.interface_of(address) or "lo"})  # of the program's own group
        open_store = load("shoal.comm.torch_job:TorchJobStore")
        store = open_store(f"shoal {next(_jobs)}", timeout_s=options.parallel.start_timeout)
        if place.local_rank == 0:
            store.set({f"ranks of group {place.group}": json.dumps([place.rank, place.rank + place.local_size])})
        reserved: tuple[socket.socket, ...] = ()
        if place.rank == 0:
            reserved = (_reserve(address, options),)
            found = [address, reserved[0].getsockname()[1], "" if env.cluster_key() else _new_key()]
            store.set({"meeting point": json.dumps(found)})
        host, port, key = json.loads(store.get("meeting point"))
        spans = [json.loads(store.get(f"ranks of group {group}")) for group in range(place.num_groups)]
        hosts = tuple(range(*span) for span in spans)
        return cls(place, Address(host, port), key or env.cluster_key(), hosts, reserved)

    def options(self) -> dict[str, Any]:
        """Return the options of this process as one of several nodes, by name."""
        found: dict[str, Any] = {"distributed_executor_backend": "mp" if self.place.size > 1 else "uni"}
        if len(self.hosts) > 1:
            found["nnodes"] = len(self.hosts)
            found["node_rank"] = self.place.group
            found["master_addr"] = self.address.host
            found["master_port"] = self.address.port
            found["placement"] = tuple((str(group), tuple(ranks)) for group, ranks in enumerate(self.hosts))
        return found

    def release_port(self) -> None:
        """Give up the reservation of the port, as rank 0 listens there now. Idempotent."""
        for sock in self.reserved:
            sock.close()


def _check(options: EngineOptions, place: env.Torchrun) -> None:
    parallel, nodes = options.parallel, options.nodes
    tp, pp, dp = parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.data_parallel_size
    if dp != 1 or tp * pp != place.size:
        ranks = f"--tensor-parallel-size {tp} x --pipeline-parallel-size {pp} x --data-parallel-size {dp}"
        raise ConfigError(
            f"{_FLAG}: torchrun has started {place.size} processes, one for each rank of one replica, but {ranks} is "
            f"{tp * pp * dp} ranks of {dp}: "
            + (
                "use --data-parallel-size 1"
                if dp != 1
                else f"start {tp * pp} processes in all (--nnodes x --nproc-per-node), or change the sizes"
            )
        )
    given = {
        "--nnodes": nodes.nnodes > 1,
        "--node-rank": nodes.node_rank,
        "--master-addr": nodes.master_addr,
        "--spare-hosts": nodes.spare_hosts,
        "--placement": nodes.placement != "auto",
    }
    if names := [flag for flag, value in given.items() if value]:
        raise ConfigError(f"{_FLAG}: torchrun says which ranks run where, so leave {', '.join(names)} out")


def _address(place: env.Torchrun) -> str:
    """Return the address of this host, as the other hosts of the job reach it."""
    if env.host_ip() is None:
        refuse_loopback_name(place.master_addr, "MASTER_ADDR")
    found = own_address(place.master_addr)
    if not found:
        raise ConfigError(
            f"this host has no way to MASTER_ADDR {place.master_addr}, where rank 0 is: give torchrun another "
            "--master-addr, or name an address of this host in SHOAL_HOST_IP"
        )
    return found


def _reserve(address: str, options: EngineOptions) -> socket.socket:
    """Keep a port free, at which rank 0 will listen."""
    ports = options.nodes.port_range if address != _LOOPBACK else None
    try:
        return reserve_port(address, (0,) if ports is None else range(ports[0], ports[1] + 1))
    except OSError as error:
        where = "" if ports is None else f" with a port of --port-range {ports[0]}-{ports[1]}"
        raise ConfigError(f"rank 0 can't listen at {address}{where} ({error.strerror})") from None


def _new_key() -> str:
    return secrets.token_hex(_KEY_BYTES)
