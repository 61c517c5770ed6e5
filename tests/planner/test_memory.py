"""What the planner says of a step's memory, held against the tensors that a step makes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from shoal.comm.local import LocalComm
from shoal.kernels import reference
from shoal.kernels.base import KVCache, PagedBatch
from shoal.models.checkpoint import open_checkpoint
from shoal.models.decoder import build_decoder
from shoal.models.loader import CheckpointWeights
from shoal.models.manifest import Shard, manifest, shards
from shoal.models.registry import read_spec, tensor_names
from shoal.models.spec import ModelSpec
from shoal.parallel.mesh import Axis
from shoal.planner import memory
from shoal.planner.memory import RankMemory, StepSize, rank_memory
from shoal.worker import runner
from support.checkpoints import MAKERS

Checkpoint = Callable[[str], Path]

BLOCK_SIZE = 16
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class PeakOfLiveTensors(TorchDispatchMode):
    """Bytes of the tensors that operations made and that are not yet gone, at their most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = set(self._storages((args, kwargs)))
        out = func(*args, **(kwargs or {}))
        self._live = {key: held for key, held in self._live.items() if not held[0].expired()}
        self._live |= {key: held for key, held in self._storages(out).items() if key not in given}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return out

    def _storages(self, values: Any) -> dict[int, tuple[StorageWeakRef, int]]:
        tensors = [value for value in tree_iter(values) if isinstance(value, Tensor)]
        storages = [tensor.untyped_storage() for tensor in tensors if not tensor.is_mkldnn]  # packed: no storage
        return {storage._cdata: (StorageWeakRef(storage), storage.nbytes()) for storage in storages}


class CopyingComm(LocalComm):
    """Other ranks' sums are a tensor of their own, as between threads."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return x + 0


def make_batch(tokens: int, context: int) -> PagedBatch:
    """The last tokens of one sequence."""
    positions = torch.arange(context - tokens, context)
    blocks = -(-context // BLOCK_SIZE)
    return PagedBatch(
        positions=positions,
        slots=positions,
        query_starts=torch.tensor([0, tokens], dtype=torch.int32),
        context_lens=torch.tensor([context], dtype=torch.int32),
        block_tables=torch.arange(blocks, dtype=torch.int32).unsqueeze(0),
        block_size=BLOCK_SIZE,
        num_single=0,
        query_lens=(tokens,),
        host_context_lens=(context,),
    )


def planned(folder: Path, shard: Shard, dtype: torch.dtype, step: StepSize) -> RankMemory:
    spec = read_spec(folder)
    params = manifest(spec, tensor_names(spec))
    stored = open_checkpoint(folder).tensors
    return rank_memory(spec, params, stored, shard, dtype=NAMES[dtype], device="cpu", block_size=BLOCK_SIZE, step=step)


@torch.inference_mode()
def measured(folder: Path, shard: Shard, dtype: torch.dtype, tokens: int, context: int, sampled: int) -> int:
    """The peak of a step of one sequence, with the reference kernels, which hold more than the native ones."""
    spec, checkpoint = read_spec(folder), open_checkpoint(folder)
    weights = CheckpointWeights(checkpoint, manifest(spec, tensor_names(spec)), shard, dtype)
    tp = Axis("tp", shard.rank, 2, CopyingComm())
    kernels = reference.ReferenceKernels()
    decoder = build_decoder(spec, shard, tp, weights, kernels, torch.device("cpu"), spec.max_positions)
    shape = (2, context + BLOCK_SIZE, len(shard.heads.kv_ids), spec.head_dim)
    caches = [KVCache(*torch.zeros(shape, dtype=dtype)) for _ in range(spec.num_layers)]
    batch, ids = make_batch(tokens, context), torch.ones(tokens, dtype=torch.int64)
    with PeakOfLiveTensors() as mode:
        hidden = decoder.hidden(ids, batch, caches, torch.arange(sampled))
        logits = decoder.logits(hidden)
        del hidden
        logits.clone()  # the sampler's own
    return int(mode.peak)


# The narrow matrices of these checkpoints make norms, attention and logits the fullest moment, each in some.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
@pytest.mark.parametrize("tp", [1, 5])
@pytest.mark.parametrize("name", sorted(MAKERS))
def test_a_step_takes_no_more_than_planned(
    checkpoint: Checkpoint, name: str, tp: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So small that a step of these tests would not fit into it at once.
    monkeypatch.setattr(reference, "SCORE_BYTES", 2**16)
    monkeypatch.setattr(memory, "SCORE_BYTES", 2**16)
    folder = checkpoint(name)
    for shard in shards(read_spec(folder), tp)[:: max(1, tp - 1)]:
        for tokens, context, sampled in ((250, 250, 1), (60, 250, 1), (120, 120, 120)):
            found = measured(folder, shard, dtype, tokens, context, sampled)
            plan = planned(folder, shard, dtype, StepSize(tokens, sampled))
            bound = plan.activations + context * plan.context_token
            assert found <= bound
            assert bound <= 4 * found  # and it is not just any large number


def test_the_constants_are_those_of_the_ranks() -> None:
    assert memory.SCORE_BYTES == reference.SCORE_BYTES
    assert memory.PROMPT_ROWS == runner._PROMPT_ROWS


def of(spec: ModelSpec, folder: Path, **changes: int) -> RankMemory:
    (shard,) = shards(spec, 1)
    step = StepSize(**{"tokens": 64, "sampled": 8, **changes})
    params = manifest(spec, tensor_names(spec))
    stored = open_checkpoint(folder).tensors
    return rank_memory(spec, params, stored, shard, dtype="float32", device="cpu", block_size=BLOCK_SIZE, step=step)


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_weights_are_those_of_the_file(checkpoint: Checkpoint, name: str) -> None:
    """Positions, biases, projections and all; in float32, in which the files are, a tied head is the embedding."""
    folder = checkpoint(name)
    spec = read_spec(folder)
    stored = {
        (entry.file, entry.offset): torch.Size(entry.shape).numel() * 4
        for entry in open_checkpoint(folder).tensors.values()
    }
    assert of(spec, folder).weights == sum(stored.values())


def test_more_of_anything_takes_more(checkpoint: Checkpoint) -> None:
    folder = checkpoint("gemma2")
    spec = read_spec(folder)
    least = of(spec, folder)
    assert of(spec, folder, tokens=2048).activations > least.activations
    assert of(spec, folder, tokens=2048).context_token > least.context_token
    assert of(spec, folder, sampled=64).activations >= least.activations


def test_two_models_under_one_block_table() -> None:
    large, small = RankMemory(1000, 100, 10, 64), RankMemory(200, 30, 12, 16)
    assert large.with_draft(small) == RankMemory(1200, 130, 12, 80)


@pytest.mark.parametrize("size", [1, 16])
@pytest.mark.parametrize("length", [None, 40])
def test_a_budget_fits(size: int, length: int | None) -> None:
    rank = RankMemory(1000, 100, 10, 64 * size)
    left = rank.kv_budget(10_000, size, length)
    tokens = left // rank.block * size
    assert 1100 + left + 10 * min(tokens, length or tokens) <= 10_000
    assert rank.kv_budget(1099, size, length) < 0
