"""What a rank has exchanged with others, as a message."""

from shoal.comm.base import OperationTotal
from shoal.parallel.mesh import Axis, Mesh
from shoal.wire.traffic import Traffic


def measured_traffic(mesh: Mesh) -> tuple[Traffic, ...]:
    """Return what a rank has exchanged on each axis of its mesh by each operation."""
    return tuple(
        _traffic(axis, operation, total)
        for axis in mesh.axes
        for operation, total in axis.comm.progress.read_totals().items()
    )


def _traffic(axis: Axis, operation: str, total: OperationTotal) -> Traffic:
    return Traffic(
        axis.name,
        operation,
        total.count,
        total.sent_bytes,
        us=_microseconds(total.ns),
        waited_us=_microseconds(total.waited_ns),
        waited_for=tuple((axis.ranks[rank], waited // 1000) for rank, waited in sorted(total.waited_for.items())),
    )


def _microseconds(ns: int | None) -> int | None:
    return None if ns is None else ns // 1000
