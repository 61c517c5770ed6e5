"""The error message for a rank that ran out of memory: the sizes, and the flags that help."""

import errno
import re

import torch

from shoal.devices import cpu
from shoal.errors import ConfigError
from shoal.values import format_bytes, parse_bytes
from shoal.wire.ranks import RankSetup

# "Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.10 GiB of which 9.50 MiB is free."
_SIZE = r"(\d{1,12}(?:\.\d{1,3})? (?:bytes|[KMGT]iB))"
_GPU_ASKED = re.compile(rf"[Tt]ried to allocate {_SIZE}")
_GPU_FREE = re.compile(rf"total capacity of {_SIZE} of which {_SIZE} is free")
# "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."
_CPU_ASKED = re.compile(r"you tried to allocate (\d+) bytes")
_CPU_ALLOCATOR = "DefaultCPUAllocator"


def explain_out_of_memory(error: BaseException, setup: RankSetup) -> str | None:
    """Return a message of one line if the error means that memory ran out, otherwise None.

    The error may come from a GPU, from PyTorch's allocator for CPUs, from Python or from the kernel.
    """
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        wanted, free = _GPU_ASKED.search(text), _GPU_FREE.search(text)
        asked = None if wanted is None else _bytes(wanted[1])
        if free is not None:
            return _line(setup, asked, available=_bytes(free[2]), total=_bytes(free[1]))
        return _line(setup, asked)
    if isinstance(error, RuntimeError) and _CPU_ALLOCATOR in text:
        wanted = _CPU_ASKED.search(text)
        return _host_line(setup, None if wanted is None else int(wanted[1]))
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return _host_line(setup, None)
    return None


def _host_line(setup: RankSetup, asked: int | None) -> str:
    try:
        total, available = cpu.memory()
    except (OSError, MemoryError, ConfigError):
        return _line(setup, asked)
    return _line(setup, asked, available=available, total=total)


def _line(setup: RankSetup, asked: int | None, available: int | None = None, total: int | None = None) -> str:
    plan, on_gpu = setup.plan, setup.rank_plan.device == "cuda"
    facts = [] if asked is None else [f"it asked for {format_bytes(asked)}"]
    if available is not None and total is not None:
        facts.append(f"{format_bytes(available)} of {format_bytes(total)} were free")
    cache = "--gpu-memory-utilization or --kv-cache-memory-bytes" if on_gpu else "--kv-cache-memory-bytes"
    return (
        f"rank {setup.rank} ran out of memory on {f'cuda:{setup.rank_plan.device_index}' if on_gpu else 'the CPU'}"
        f"{': ' if facts else ''}{', '.join(facts)}. Lower --max-num-batched-tokens ({plan.max_num_batched_tokens}), "
        f"--max-num-seqs ({plan.max_num_seqs}), {cache}, or --max-model-len ({plan.max_model_len})"
    )


def _bytes(text: str) -> int:
    return parse_bytes(text.replace(" bytes", ""), "memory")
