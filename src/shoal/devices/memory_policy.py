"""From which NUMA node the kernel takes the memory of a thread. This module is free of torch."""

import ctypes
import os
import platform

_PREFERRED = 1  # MPOL_PREFERRED
_SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}  # the number of the system call
_BITS = 8 * ctypes.sizeof(ctypes.c_ulong)


def prefer_memory_of(node: int) -> str:
    """Have the kernel take memory for this thread, and for threads that it starts, from a node as long as it has some.

    When the node is full, memory comes from others: with a strict binding the kernel would end the process instead.

    Returns:
        "", or why the kernel has refused. Containers often forbid this call; then memory comes from the node of the
        core that writes it first, which is the same node if threads are bound to cores.
    """
    number = _SET_MEMPOLICY.get(platform.machine())
    if number is None:
        return f"not known how to do so on {platform.machine()}"
    mask = (ctypes.c_ulong * (node // _BITS + 1))()
    mask[node // _BITS] = 1 << node % _BITS
    libc = ctypes.CDLL(None, use_errno=True)
    # The kernel reads one bit less than it is told.
    failed = libc.syscall(number, _PREFERRED, mask, ctypes.c_ulong(len(mask) * _BITS + 1))
    return os.strerror(ctypes.get_errno()) if failed else ""
