"""What a rank does, as events of a trace: steps, layers, operations between ranks, and waits."""

import os
import socket
from collections.abc import Callable, Sequence
from typing import TypeVar

from shoal.comm.base import OperationTotal, Progress
from shoal.parallel.mesh import Axis, Mesh
from shoal.trace.clocks import clock_identity, now
from shoal.trace.event_buffer import EventBuffer
from shoal.wire.ranks import RankCall, RankSetup, StepMask, StepPlan
from shoal.wire.trace import TRACE, EventKind, TrackEvents
from shoal.worker.rank_model import RankModel

T = TypeVar("T")


class RankTrace:
    """Records what a rank does, from its making on."""

    def __init__(self, setup: RankSetup) -> None:
        self._rank = setup.rank
        self._title = f"rank {setup.rank}"
        self._world_size = setup.world_size
        self._buffer = EventBuffer()

    def watch(self, mesh: Mesh) -> None:
        """Record the operations on all axes of a mesh."""
        self._title = f"rank {self._rank} (tp {mesh.tp.rank}, pp {mesh.pp.rank})"
        for axis in mesh.axes:
            axis.comm.progress.watch = _OperationTimes(axis, self._world_size, self._buffer)

    def watch_layers(self, models: Sequence[RankModel]) -> None:
        """Record the layers of models, which are loaded. The second one is a draft model."""
        for number, model in enumerate(models):
            model.decoder.watch_layers(_LayerTimes(model.shard.stage.layers.start, number, self._buffer))

    def unwatch(self, mesh: Mesh, models: Sequence[RankModel]) -> None:
        """Record no operations and no layers any more."""
        for axis in mesh.axes:
            axis.comm.progress.watch = None
        for model in models:
            if model.loaded:
                model.decoder.watch_layers(None)

    def timed(
        self, message: StepPlan | StepMask | RankCall, handle: Callable[[StepPlan | StepMask | RankCall], T]
    ) -> T:
        """Handle a message, and record how long that has taken."""
        begun = now()
        answer = handle(message)
        match message:
            case StepPlan():
                tokens = sum(work.count for work in message.work)
                self._buffer.add(EventKind.STEP, begun, now(), message.step, len(message.work), tokens)
            case StepMask():
                self._buffer.add(EventKind.DRAW, begun, now(), message.step)
            case RankCall() if message.verb != TRACE:
                self._buffer.add(EventKind.CALL, begun, now(), self._buffer.name(message.verb))
        return answer

    def take(self, asked: int) -> TrackEvents:
        """Return what was recorded since the last call. `asked`: when the rank was asked for it."""
        rows, names, dropped = self._buffer.take()
        return TrackEvents(
            self._rank,
            self._title,
            socket.gethostname(),
            os.getpid(),
            clock_identity(),
            asked,
            now(),
            rows,
            names,
            dropped,
        )


class _LayerTimes:
    """Records the layers of a model, as a `LayerWatch`."""

    def __init__(self, first: int, model: int, buffer: EventBuffer) -> None:
        self._first = first
        self._model = model
        self._buffer = buffer
        self._begun = 0

    def began(self) -> None:
        self._begun = now()

    def ended(self, layer: int) -> None:
        self._buffer.add(EventKind.LAYER, self._begun, now(), self._first + layer, self._model)


class _OperationTimes:
    """Records the operations on one axis and their waits, as an `OperationWatch`.

    A wait is what an operation has added to the time that its communicator has waited. Where in the operation it was is
    not known, except that most waits are at its beginning; so it is shown there.
    """

    def __init__(self, axis: Axis, world_size: int, buffer: EventBuffer) -> None:
        """`world_size`: the number of ranks of a replica."""
        self._members = [divmod(rank, world_size) for rank in axis.ranks]  # replica, and rank in it
        self._progress: Progress = axis.comm.progress
        self._axis = buffer.name(axis.name)
        self._buffer = buffer
        self._begun = 0  # 0: no operation that moves tensors has begun
        self._sent_bytes = 0
        # How long each operation has waited so far: in all, and by the rank that came last.
        self._waited = {name: _waits(total) for name, total in self._progress.read_totals().items()}

    def began(self, operation: str, sent_bytes: int) -> None:
        self._sent_bytes = sent_bytes
        self._begun = now()

    def ended(self, operation: str) -> None:
        ended, begun, self._begun = now(), self._begun, 0
        if not begun:
            return
        name = self._buffer.name(operation)
        self._buffer.add(EventKind.OPERATION, begun, ended, self._axis, name, self._sent_bytes)
        self._note_wait(operation, begun, ended)

    def _note_wait(self, operation: str, begun: int, ended: int) -> None:
        """Record the wait of an operation that has just ended, if its backend tells of one."""
        total = self._progress.read_total(operation)
        before, by_rank = self._waited.get(operation, (0, {}))
        waited = (total.waited_ns or 0) - before
        if not waited:
            return
        whom = max(total.waited_for, key=lambda rank: total.waited_for[rank] - by_rank.get(rank, 0), default=-1)
        self._waited[operation] = _waits(total)
        replica, rank = self._members[whom] if whom >= 0 else (-1, -1)
        self._buffer.add(EventKind.WAIT, begun, begun + min(waited, ended - begun), rank, replica)


def _waits(total: OperationTotal) -> tuple[int, dict[int, int]]:
    return total.waited_ns or 0, dict(total.waited_for)
