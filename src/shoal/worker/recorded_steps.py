"""Decoding steps that are recorded once for each number of tokens, and replayed after that."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from shoal.kernels.base import KVCache, PagedBatch
from shoal.kernels.recording import NotRecordable, Pool, Recorder, Recording
from shoal.log import get_logger
from shoal.models.causal_model import CausalModel
from shoal.worker.decode_batch import DecodeBuffers

log = get_logger("worker")

# The most tokens of a recorded step. In larger ones the calls from Python take a small part of the time.
MOST_TOKENS = 128
_GARBAGE = 0xFF  # a NaN in all floating-point types


@runtime_checkable
class LayeredModel(Protocol):
    """A model whose layers are apart from what is before and after them."""

    @property
    def is_watched(self) -> bool:
        """True if somebody is told of each layer."""

    def embed(self, inputs: Tensor, batch: PagedBatch) -> Tensor:
        """Return the residual stream before the first layer: [n, hidden]."""

    def run_layers(
        self, x: Tensor, residual: Tensor, batch: PagedBatch, caches: list[KVCache]
    ) -> tuple[Tensor, Tensor]:
        """Compute all layers. Of arguments and of results the sum, x + residual, is the residual stream."""

    def finish(self, x: Tensor, residual: Tensor, rows: Tensor | None) -> Tensor:
        """Return the result of `hidden` for the results of `run_layers`."""


class RecordedSteps:
    """Computes the hidden states of steps, those of decoding steps by recordings where that is possible.

    All recordings work on the same input tensors and on one pool of memory.
    """

    def __init__(
        self, model: CausalModel, caches: list[KVCache], buffers: DecodeBuffers, *, alone: bool, enabled: bool = True
    ) -> None:
        """Record nothing yet.

        Args:
            buffers: from where recorded steps read their batch. Batches of other tensors are copied there.
            alone: the layers exchange nothing with other ranks, so a recording can be tried.
            enabled: False: compute all steps without recordings.
        """
        self._model = model
        self._caches = caches
        self._buffers = buffers
        self._most_tokens = min(MOST_TOKENS, buffers.max_tokens)
        self._alone = alone
        on_cpu = all(cache.keys.device.type == "cpu" for cache in caches)
        self._layers = model if enabled and on_cpu and isinstance(model, LayeredModel) else None
        self._recordings: dict[int, _RecordedStep] = {}
        self._inputs: _Inputs | None = None
        self._pool = Pool()

    @property
    def recorded(self) -> dict[int, int]:
        """The numbers of tokens of the steps that were recorded, and how many calls from Python a replay takes."""
        return {tokens: step.recording.parts for tokens, step in self._recordings.items()}

    def hidden(self, inputs: Tensor, batch: PagedBatch, rows: Tensor | None) -> Tensor:
        """Do the same as `CausalModel.hidden`."""
        count = len(batch.query_lens)
        if self._layers is None or self._layers.is_watched or not 0 < batch.num_single == count <= self._most_tokens:
            return self._model.hidden(inputs, batch, self._caches, rows)
        layers, residual = self._layers, self._layers.embed(inputs, batch)
        step = self._recordings.get(count) or self._record(layers, residual, batch)
        if step is None:
            x, residual = layers.run_layers(torch.zeros_like(residual), residual, batch, self._caches)
        else:
            x, residual = step.run(residual, batch)
        return layers.finish(x, residual, rows)

    def _record(self, layers: LayeredModel, residual: Tensor, batch: PagedBatch) -> "_RecordedStep | None":
        """Record the layers of a step, and return the recording; None if that is impossible."""
        if self._inputs is None:
            self._inputs = _Inputs(residual, self._buffers)
        inputs = self._inputs.first(len(residual))
        inputs.fill(residual, batch)
        try:
            with Recorder(self._pool) as recorder:
                found = layers.run_layers(inputs.x, inputs.residual, inputs.batch, self._caches)
            step = _RecordedStep(inputs, recorder.recording(), *map(self._pool.alias, found))
            if self._alone:
                self._try(step, [each.clone() for each in found], residual, batch)
        except NotRecordable as reason:
            log.debug("decoding steps are not recorded: %s", reason)
            self._layers = None
            return None
        self._recordings[len(residual)] = step
        return step

    def _try(self, step: "_RecordedStep", expected: list[Tensor], residual: Tensor, batch: PagedBatch) -> None:
        """Compare a replay with the results of the recorded step.

        Raises:
            NotRecordable: they differ, so the step does something that the recorder has not seen.
        """
        self._pool.fill(_GARBAGE)
        found = step.run(residual, batch)
        if not all(torch.equal(_bits(a), _bits(b)) for a, b in zip(found, expected, strict=True)):
            log.warning("a recorded step has other results than the step itself, so steps are not recorded")
            raise NotRecordable("a replay has other results")


class _Inputs:
    """The tensors from which recorded steps read. All sizes of steps share them."""

    def __init__(self, residual: Tensor, buffers: DecodeBuffers) -> None:
        """`residual`: a tensor of the width and dtype of the residual stream."""
        self.x = torch.zeros((MOST_TOKENS, residual.shape[1]), dtype=residual.dtype)
        self.residual = torch.zeros_like(self.x)
        self.buffers = buffers

    def first(self, count: int) -> "_StepInputs":
        """Return the inputs of a step of `count` tokens."""
        _, batch = self.buffers.first(count)
        return _StepInputs(self.x[:count], self.residual[:count], batch)


@dataclass(frozen=True, slots=True)
class _StepInputs:
    """The inputs of the layers in recorded steps of one size."""

    x: Tensor
    residual: Tensor
    batch: PagedBatch

    def fill(self, residual: Tensor, batch: PagedBatch) -> None:
        self.x.zero_()
        self.residual.copy_(residual)
        if batch.positions is self.batch.positions:  # they are the buffers themselves
            return
        self.batch.positions.copy_(batch.positions)
        self.batch.slots.copy_(batch.slots)
        self.batch.context_lens.copy_(batch.context_lens)
        self.batch.block_tables[:, : batch.block_tables.shape[1]].copy_(batch.block_tables)


@dataclass(frozen=True, slots=True)
class _RecordedStep:
    """The recorded layers of a step of one size."""

    inputs: _StepInputs
    recording: Recording
    x: Tensor  # the results; the next replay of any size overwrites them
    residual: Tensor

    def run(self, residual: Tensor, batch: PagedBatch) -> tuple[Tensor, Tensor]:
        self.inputs.fill(residual, batch)
        self.recording.replay()
        return self.x.clone(), self.residual.clone()


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)
