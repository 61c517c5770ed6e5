"""Collective operations under the names of vLLM, for the user's own programs, started by `torchrun` for example.

    from shoal import distributed

    distributed.init_distributed_environment()
    total = distributed.tensor_model_parallel_all_reduce(partial)
    distributed.destroy_distributed_environment()

This is a thin layer over Shoal's communicators, with one group per process. Shoal itself does not use it: its layers
get the group over which they are split as an argument.
"""

import datetime
import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from shoal.addresses import resolve
from shoal.comm.base import Communicator
from shoal.comm.local import LocalComm
from shoal.comm.process_comm import ProcessComm
from shoal.comm.select import Requested
from shoal.errors import ConfigError

_c10d: Any = torch.distributed  # its bindings carry no usable types
_DEFAULT_TIMEOUT_S = 600.0


@dataclass(slots=True)
class _DistributedState:
    """The groups of this process, None before they are initialized."""

    tp: Communicator | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    starts: int = 0  # the number of initializations; each has a prefix of its own in the store


_process = _DistributedState()


def init_distributed_environment(
    world_size: int = -1,
    rank: int = -1,
    distributed_init_method: str = "env://",
    local_rank: int = -1,
    backend: str | None = None,
    *,
    tensor_model_parallel_size: int | None = None,
    timeout_s: float = _DEFAULT_TIMEOUT_S,
) -> None:
    """Join the other processes, and initialize `torch.distributed` if it is not initialized yet.

    Args:
        world_size: -1 to read it from the environment, where `torchrun` sets it; `rank` too.
        local_rank: the number of this process's GPU; -1 for its rank modulo the number of GPUs.
        backend: nccl or gloo, also that of the default group; by default nccl if this process has a GPU, and
            otherwise gloo for the default group and shared memory for tensors of processes on one host.
        tensor_model_parallel_size: the size of each tensor-parallel group of consecutive ranks; by default one group
            has all processes.

    Raises:
        ConfigError: this was called before, or `tensor_model_parallel_size` does not divide the number of processes.
    """
    if _process.tp is not None:
        raise ConfigError("init_distributed_environment was called before: call destroy_distributed_environment first")
    timeout = datetime.timedelta(seconds=timeout_s)
    store, rank, world_size = next(
        iter(_c10d.rendezvous(distributed_init_method, rank=rank, world_size=world_size, timeout=timeout))
    )
    tp = tensor_model_parallel_size or world_size
    if world_size % tp:
        raise ConfigError(f"tensor_model_parallel_size {tp} does not divide the {world_size} processes")
    requested: Requested = "gloo" if backend == "gloo" else "auto"
    backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    device = torch.device("cpu")
    if backend == "nccl":
        number = local_rank if local_rank >= 0 else rank % torch.cuda.device_count()
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    _process.starts += 1
    store = _c10d.PrefixStore(f"shoal {_process.starts}", store)
    if not _c10d.is_initialized():
        _c10d.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    comm: Communicator = LocalComm()
    if tp > 1:
        prefix = f"shoal tensor parallel {rank // tp}"
        comm = ProcessComm(
            store,
            prefix,
            rank % tp,
            tp,
            requested=requested,
            timeout_s=timeout_s,
            device=device,
            interface_address=_address_towards(store),
        )
    _process.tp, _process.device = comm, device


def _address_towards(store: Any) -> str:
    """Return the address of this host that the host of the store can reach; loopback for a store without a host."""
    while isinstance(store, _c10d.PrefixStore):
        store = store.underlying_store
    if not isinstance(store, _c10d.TCPStore):
        return "127.0.0.1"
    family, there = resolve(store.host, store.port)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as towards:
        towards.connect(there)  # sends nothing, but chooses the network interface
        return str(towards.getsockname()[0])


def destroy_distributed_environment() -> None:
    """Leave the groups, and destroy the process group of `torch.distributed`. May be called again."""
    if _process.tp is not None:
        _process.tp = None
        if _c10d.is_initialized():
            _c10d.destroy_process_group()


def get_process_group() -> Any:
    """Return the process group of `torch.distributed` with all processes.

    Raises:
        ConfigError: `init_distributed_environment` was not called.
    """
    _tensor_parallel()
    return _c10d.group.WORLD


def get_tensor_model_parallel_world_size() -> int:
    return _tensor_parallel().size


def get_tensor_model_parallel_rank() -> int:
    return _tensor_parallel().rank


def tensor_model_parallel_all_reduce(x: Tensor) -> Tensor:
    """Return the sum over the group. The result may be x itself, overwritten."""
    return _tensor_parallel().all_reduce(x)


def tensor_model_parallel_all_gather(x: Tensor, dim: int = -1) -> Tensor:
    """Concatenate the tensors of the group along `dim`, where their sizes may differ.

    x: [..., n_r, ...]. Gives [..., sum of n_r, ...].
    """
    comm = _tensor_parallel()
    dim %= x.ndim
    ours = torch.tensor([x.shape[dim]], device=x.device)
    sizes = comm.all_gather(ours, [1] * comm.size).tolist()
    return comm.all_gather(x, sizes, dim)


def tensor_model_parallel_reduce_scatter(x: Tensor, dim: int = -1) -> Tensor:
    """Sum over the group and split the sum along `dim`, one part for each rank.

    If the group's size does not divide the dimension, the first parts are larger by one.

    x: [..., n, ...]. Gives [..., n_r, ...].
    """
    comm = _tensor_parallel()
    dim %= x.ndim
    each, more = divmod(x.shape[dim], comm.size)
    sizes = [each + (rank < more) for rank in range(comm.size)]
    return comm.reduce_scatter(x.transpose(0, dim).contiguous(), sizes).transpose(0, dim).contiguous()


def broadcast_tensor_dict(tensor_dict: Mapping[str, Any] | None = None, src: int = 0) -> dict[str, Any]:
    """Return the dictionary of rank `src` of the group, with tensors and plain data, on every rank.

    The other ranks pass None. Tensors arrive on the device of the group.

    Raises:
        ConfigError: rank `src` passes None, or a value that is neither a tensor nor plain data (None, booleans,
            numbers, strings, lists and dictionaries of these).
    """
    comm, device = _tensor_parallel(), _process.device
    description = _describe(tensor_dict) if comm.rank == src else b""
    length = int(comm.broadcast(torch.tensor([len(description)], device=device), src))
    encoded = torch.tensor(list(description.ljust(length, b"\0")), dtype=torch.uint8, device=device)
    encoded = comm.broadcast(encoded, src) if length else encoded
    if not len(encoded):
        raise ConfigError(f"broadcast_tensor_dict: rank {src} passes no dictionary that can be sent")
    found: dict[str, Any] = {}
    for name, kind, value in json.loads(bytes(encoded.tolist())):
        if kind == "plain":
            found[name] = value
            continue
        dtype, shape = value
        if tensor_dict is not None and comm.rank == src:
            tensor = tensor_dict[name].to(device, copy=True)
        else:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        found[name] = comm.broadcast(tensor, src) if tensor.numel() else tensor
    return found


def _describe(tensor_dict: Mapping[str, Any] | None) -> bytes:
    """Encode the names, and the values or the tensors' dtypes and shapes. Return b"" if they cannot be sent."""
    if tensor_dict is None:
        return b""
    entries = [
        (name, "tensor", (str(value.dtype).removeprefix("torch."), list(value.shape)))
        if isinstance(value, Tensor)
        else (name, "plain", value)
        for name, value in tensor_dict.items()
    ]
    try:
        return json.dumps(entries).encode()
    except (TypeError, ValueError):
        return b""


def _tensor_parallel() -> Communicator:
    if _process.tp is None:
        raise ConfigError("call init_distributed_environment first")
    return _process.tp
