"""Operations between processes by the names that people know, for programs of their own under `torchrun` or the like.

    from shoal import distributed

    distributed.init_distributed_environment()
    total = distributed.tensor_model_parallel_all_reduce(partial)
    distributed.destroy_distributed_environment()

A thin layer over Shoal's communicators, one group a process. Nothing inside of Shoal uses it: layers are handed the
group that they are split over.
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

from shoal.addresses import resolved
from shoal.comm.base import Communicator
from shoal.comm.local import LocalComm
from shoal.comm.torch_distributed import TorchComm
from shoal.errors import ConfigError

_c10d: Any = torch.distributed  # its bindings carry no usable types
_DEFAULT_TIMEOUT_S = 600.0


@dataclass(slots=True)
class _ProcessGroups:
    """What this process is part of; None before the start."""

    tp: Communicator | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    times: int = 0  # it was started, which keeps what it leaves in a store apart from what comes later


_process = _ProcessGroups()


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
    """Joins the other processes; also initializes `torch.distributed`, if nobody has.

    Sizes and ranks of -1 come from the environment, as `torchrun` sets it. `backend` is nccl where this process has a
    GPU (number `local_rank`, else its rank modulo their count), else gloo. The tensor-parallel group are all processes,
    or `tensor_model_parallel_size` neighbours each.

    Raises:
        ConfigError: it was called before, or the sizes do not go together.
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
    backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    device = torch.device("cpu")
    if backend == "nccl":
        number = local_rank if local_rank >= 0 else rank % torch.cuda.device_count()
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    _process.times += 1
    store = _c10d.PrefixStore(f"shoal {_process.times}", store)
    if not _c10d.is_initialized():
        _c10d.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    comm: Communicator = LocalComm()
    if tp > 1:
        prefix = f"shoal tensor parallel {rank // tp}"
        comm = TorchComm(
            store,
            prefix,
            rank % tp,
            tp,
            backend=backend,
            timeout_s=timeout_s,
            device=device,
            interface_address=_address_towards(store),
        )
    _process.tp, _process.device = comm, device


def _address_towards(store: Any) -> str:
    """Of this host, as the one that keeps the store reaches it; loopback where none does, as for a file."""
    while isinstance(store, _c10d.PrefixStore):
        store = store.underlying_store
    if not isinstance(store, _c10d.TCPStore):
        return "127.0.0.1"
    family, there = resolved(store.host, store.port)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as towards:
        towards.connect(there)  # sends nothing, but chooses a way
        return str(towards.getsockname()[0])


def destroy_distributed_environment() -> None:
    """Leaves. Idempotent."""
    if _process.tp is not None:
        _process.tp = None
        if _c10d.is_initialized():
            _c10d.destroy_process_group()


def get_process_group() -> Any:
    """All processes, as a process group of `torch.distributed`.

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
    """The sum over the group. The result may be x itself, changed."""
    return _tensor_parallel().all_reduce(x)


def tensor_model_parallel_all_gather(x: Tensor, dim: int = -1) -> Tensor:
    """All tensors of the group side by side along `dim`; they may differ in size there.

    x: [..., n_r, ...]. Gives [..., sum of n_r, ...].
    """
    comm = _tensor_parallel()
    dim %= x.ndim
    ours = torch.tensor([x.shape[dim]], device=x.device)
    sizes = comm.all_gather(ours, [1] * comm.size).tolist()
    return comm.all_gather(x, sizes, dim)


def tensor_model_parallel_reduce_scatter(x: Tensor, dim: int = -1) -> Tensor:
    """The sum over the group, of which each rank gets its part along `dim`; the first parts are larger by one where the
    group does not divide it.

    x: [..., n, ...]. Gives [..., n_r, ...].
    """
    comm = _tensor_parallel()
    dim %= x.ndim
    each, more = divmod(x.shape[dim], comm.size)
    sizes = [each + (rank < more) for rank in range(comm.size)]
    return comm.reduce_scatter(x.transpose(0, dim).contiguous(), sizes).transpose(0, dim).contiguous()


def broadcast_tensor_dict(tensor_dict: Mapping[str, Any] | None = None, src: int = 0) -> dict[str, Any]:
    """The dictionary of rank `src` of the group, tensors and plain data, at every rank. The others give None. Tensors
    arrive on the device of the group.

    Raises:
        ConfigError: rank `src` brings none, or a value that is neither a tensor nor plain data (None, truth values,
            numbers, texts, lists and dictionaries of these).
    """
    comm, device = _tensor_parallel(), _process.device
    described = _describe(tensor_dict) if comm.rank == src else b""
    length = int(comm.broadcast(torch.tensor([len(described)], device=device), src))
    told = torch.tensor(list(described.ljust(length, b"\0")), dtype=torch.uint8, device=device)
    told = comm.broadcast(told, src) if length else told
    if not len(told):
        raise ConfigError(f"broadcast_tensor_dict: rank {src} brings nothing that can be sent, see its own error")
    found: dict[str, Any] = {}
    for name, kind, value in json.loads(bytes(told.tolist())):
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
    """Names, and values or the tensors' types and shapes; nothing where the others must be told that it can't be."""
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
