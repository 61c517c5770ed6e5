"""What the planner says of a step's memory, held against the tensors that a step makes."""

import math
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
from shoal.config.engine_options import ExpertPlacement
from shoal.kernels import reference
from shoal.kernels.base import PagedBatch
from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.models.checkpoint.loader import CheckpointWeights
from shoal.models.decoder import build_decoder
from shoal.models.implementation import Cutting, rank_shards
from shoal.models.manifest import Shard, manifest, shards
from shoal.models.registry import read_spec, tensor_names
from shoal.models.spec import ModelSpec
from shoal.parallel.mesh import Axis
from shoal.parallel.stages import cut_evenly
from shoal.planner import memory
from shoal.planner.memory import RankMemory, StepSize, rank_memory
from shoal.worker import runner
from shoal.worker.kv_cache import allocate
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
    return rank_memory(spec, params, shard, dtype=NAMES[dtype], device="cpu", block_size=BLOCK_SIZE, step=step)


@torch.inference_mode()
def measured(folder: Path, shard: Shard, dtype: torch.dtype, tokens: int, context: int, sampled: int) -> int:
    """The peak of a step of one sequence, with the reference kernels, which hold more than the native ones."""
    spec, checkpoint = read_spec(folder), open_checkpoint(folder)
    weights = CheckpointWeights(checkpoint, manifest(spec, tensor_names(spec)), shard, dtype)
    tp = Axis("tp", shard.rank, 2, CopyingComm())
    kernels = reference.ReferenceKernels()
    decoder = build_decoder(spec, shard, tp, weights, kernels, torch.device("cpu"), spec.max_positions)
    blocks = context // BLOCK_SIZE + 1
    caches = allocate(spec, shard, blocks, BLOCK_SIZE, dtype, torch.device("cpu")).layers
    batch, ids = make_batch(tokens, context), torch.ones(tokens, dtype=torch.int64)
    inputs = ids if shard.stage.first else torch.ones(tokens, spec.hidden_size, dtype=dtype)
    with PeakOfLiveTensors() as mode:
        hidden = decoder.hidden(inputs, batch, caches, torch.arange(sampled))
        if shard.stage.last:
            logits = decoder.logits(hidden)
            del hidden
            logits.clone()  # the sampler's own
    return int(mode.peak)


# The narrow matrices of these checkpoints make norms, attention and logits the fullest moment, each in some.
@pytest.mark.parametrize(("tp", "dtype"), [(1, torch.float32), (5, torch.bfloat16)], ids=["1-float32", "5-bfloat16"])
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


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_a_step_of_a_stage_takes_no_more_than_planned(
    checkpoint: Checkpoint, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a stage gets and gives is there beside it."""
    monkeypatch.setattr(reference, "SCORE_BYTES", 2**16)
    monkeypatch.setattr(memory, "SCORE_BYTES", 2**16)
    folder, tokens = checkpoint(name), 120
    spec = read_spec(folder)
    stream = tokens * spec.hidden_size * 4
    for shard in rank_shards(spec, Cutting(stages=cut_evenly([1.0] * spec.num_layers, 3))):
        borders = (not shard.stage.first) + (not shard.stage.last)
        found = measured(folder, shard, torch.float32, tokens, tokens, 1) + borders * stream
        plan = planned(folder, shard, torch.float32, StepSize(tokens, 1))
        bound = plan.activations + tokens * plan.context_token
        assert found <= bound
        assert bound <= 4 * found


def test_the_constants_are_those_of_the_ranks() -> None:
    assert memory.SCORE_BYTES == reference.SCORE_BYTES
    assert memory.PROMPT_ROWS == runner.PROMPT_ROWS


def of(spec: ModelSpec, folder: Path, **changes: int) -> RankMemory:
    (shard,) = shards(spec, 1)
    step = StepSize(**{"tokens": 64, "sampled": 8, **changes})
    params = manifest(spec, tensor_names(spec))
    return rank_memory(spec, params, shard, dtype="float32", device="cpu", block_size=BLOCK_SIZE, step=step)


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_weights_are_those_of_the_file(checkpoint: Checkpoint, name: str) -> None:
    """Positions, biases, projections and all; a tied embedding is there as the head once more."""
    folder = checkpoint(name)
    spec = read_spec(folder)
    entries = open_checkpoint(folder).tensors
    stored = {(entry.file, entry.offset): torch.Size(entry.shape).numel() * 4 for entry in entries.values()}
    params = manifest(spec, tensor_names(spec))
    embedding = next(param.pieces[0] for param in params if param.name == "embedding")
    again = math.prod(entries[embedding.source].shape) * 4 if spec.tie_embeddings else 0
    assert of(spec, folder).weights == sum(stored.values()) + again


class Recorded(CheckpointWeights):
    """Notes the sizes of what is asked for, by name."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.bytes: dict[str, int] = {}

    def tensor(self, name: str) -> Tensor:
        found = super().tensor(name)
        assert name not in self.bytes, "asked for once each"
        self.bytes[name] = found.nbytes
        return found


def loaded(folder: Path, cutting: Cutting, rank: int, shard: Shard) -> dict[str, int]:
    """Bytes of every tensor that a rank reads from the file."""
    spec, checkpoint = read_spec(folder), open_checkpoint(folder)
    weights = Recorded(checkpoint, manifest(spec, tensor_names(spec)), shard, torch.float32)
    tp = Axis("tp", rank % cutting.tp, cutting.tp, CopyingComm())
    build_decoder(spec, shard, tp, weights, reference.ReferenceKernels(), torch.device("cpu"), spec.max_positions)
    return weights.bytes


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_weights_are_those_that_a_rank_of_any_layout_reads(checkpoint: Checkpoint, name: str) -> None:
    """What is planned for each rank, and what its stage and share of the decoder ask for."""
    folder = checkpoint(name)
    spec = read_spec(folder)
    (whole,) = (loaded(folder, Cutting(), 0, shard) for shard in rank_shards(spec, Cutting()))
    for tp, pp in ((1, 2), (1, 3), (2, 2), (3, 1)):
        cutting = Cutting(tp, stages=cut_evenly([1.0] * spec.num_layers, pp))
        stages: dict[str, int] = {}
        for rank, shard in enumerate(rank_shards(spec, cutting)):
            read = loaded(folder, cutting, rank, shard)
            plan = planned(folder, shard, torch.float32, StepSize(8, 8))
            assert plan.weights == sum(read.values())
            if tp == 1:
                assert not stages.keys() & read.keys(), "in one stage each"
                stages |= read
        assert tp > 1 or stages == whole  # a tied embedding is the table of the first stage and the head of the last


@pytest.mark.parametrize("strategy", ["linear", "round_robin"])
def test_whole_experts_are_read_where_they_are_placed(checkpoint: Checkpoint, strategy: ExpertPlacement) -> None:
    """5 experts over 2 replicas of 2 ranks."""
    folder = checkpoint("mixtral")
    spec = read_spec(folder)
    read: list[str] = []
    for replica in range(2):
        cutting = Cutting(2, stages=(2, 1), experts=strategy, replica=replica, replicas=2)
        for rank, shard in enumerate(rank_shards(spec, cutting)):
            found = loaded(folder, cutting, rank, shard)
            assert planned(folder, shard, torch.float32, StepSize(8, 8)).weights == sum(found.values())
            read += [name for name in found if ".experts." in name]
    params = manifest(spec, tensor_names(spec))
    assert sorted(read) == sorted(param.name for param in params if param.expert is not None)


def test_a_tied_embedding_on_a_gpu_is_on_both_ends(checkpoint: Checkpoint) -> None:
    """A rank with both has it once; on two stages each has its own."""
    folder = checkpoint("llama3")
    spec, table = read_spec(folder), 301 * 64 * 4

    def weights(pp: int) -> list[int]:
        params = manifest(spec, tensor_names(spec))
        sizes: Any = {"dtype": "float32", "block_size": BLOCK_SIZE, "step": StepSize(8, 8)}
        shards = rank_shards(spec, Cutting(stages=cut_evenly([1.0] * spec.num_layers, pp)))
        return [rank_memory(spec, params, shard, device="cuda", **sizes).weights for shard in shards]

    (one,) = weights(1)
    assert sum(weights(2)) == sum(weights(3)) == one + table


def test_stages_between_have_no_logits(checkpoint: Checkpoint) -> None:
    """So many rows that the logits are the fullest moment where there are any."""
    folder = checkpoint("llama")
    shards = rank_shards(read_spec(folder), Cutting(stages=(1, 1, 1)))
    first, middle, last = (planned(folder, shard, torch.float32, StepSize(512, 512)).activations for shard in shards)
    border = 512 * 64 * 4
    assert first <= middle < last
    assert middle == 2 * border + (first - border)
    assert last > 512 * 301 * 4


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
