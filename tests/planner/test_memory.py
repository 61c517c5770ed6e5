"""The planner's bounds on the memory of a step, compared with the tensors that a step makes."""

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
from shoal.models.implementation import params_of, rank_shards
from shoal.models.manifest import Shard, make_manifest, make_shards
from shoal.models.registry import read_spec, tensor_names
from shoal.models.spec import ModelSpec
from shoal.parallel.mesh import Axis
from shoal.parallel.stages import balance_stages
from shoal.planner import memory
from shoal.planner.memory import RankMemory, StepSize, rank_memory
from shoal.wire.plan import Layout
from shoal.worker import runner
from shoal.worker.kv_cache import allocate
from support.checkpoints import MAKERS

Checkpoint = Callable[[str], Path]

BLOCK_SIZE = 16
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class PeakOfLiveTensors(TorchDispatchMode):
    """A measurement of the most bytes that tensors made by operations take at one time."""

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
        storages = [tensor.untyped_storage() for tensor in tensors if not tensor.is_mkldnn]  # those have no storage
        return {storage._cdata: (StorageWeakRef(storage), storage.nbytes()) for storage in storages}


class CopyingComm(LocalComm):
    """A communicator whose all-reduce makes a new tensor, as the one between threads does."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return x + 0


def make_batch(tokens: int, context: int) -> PagedBatch:
    """Return a batch with the last `tokens` tokens of one sequence."""
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


def planned(
    folder: Path, shard: Shard, dtype: torch.dtype, step: StepSize, quantization: str = "", kv: str = ""
) -> RankMemory:
    spec = read_spec(folder)
    params = params_of(spec, quantization=quantization)
    sizes: Any = {"dtype": NAMES[dtype], "device": "cpu", "block_size": BLOCK_SIZE}
    return rank_memory(spec, params, shard, step=step, kv_dtype=kv, **sizes)


@torch.inference_mode()
def measured(
    folder: Path,
    shard: Shard,
    dtype: torch.dtype,
    tokens: int,
    context: int,
    sampled: int,
    quantization: str = "",
    kv: str = "",
) -> int:
    """Return the peak of a step of one sequence, in bytes, with the reference kernels.

    They need more memory than the native ones.
    """
    spec, checkpoint = read_spec(folder), open_checkpoint(folder)
    weights = CheckpointWeights(checkpoint, params_of(spec, checkpoint.shapes, quantization), shard, dtype)
    tp = Axis("tp", shard.rank, 2, CopyingComm())
    kernels = reference.ReferenceKernels()
    decoder = build_decoder(spec, shard, tp, weights, kernels, torch.device("cpu"), spec.max_positions)
    blocks = context // BLOCK_SIZE + 1
    caches = allocate(spec, shard, blocks, BLOCK_SIZE, kv or NAMES[dtype], torch.device("cpu")).layers
    batch, ids = make_batch(tokens, context), torch.ones(tokens, dtype=torch.int64)
    inputs = ids if shard.stage.first else torch.ones(tokens, spec.hidden_size, dtype=dtype)
    with PeakOfLiveTensors() as mode:
        hidden = decoder.hidden(inputs, batch, caches, torch.arange(sampled))
        if shard.stage.last:
            logits = decoder.logits(hidden).float()
            del hidden
            logits.clone()  # the sampler's own
    return int(mode.peak)


# As the matrices of these checkpoints are narrow, the fullest moment is a norm in some, attention or logits in others.
@pytest.mark.parametrize(("tp", "dtype"), [(1, torch.float32), (5, torch.bfloat16)], ids=["1-float32", "5-bfloat16"])
@pytest.mark.parametrize("name", sorted(MAKERS))
def test_a_step_takes_no_more_than_planned(
    checkpoint: Checkpoint, name: str, tp: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So small that the scores of a step of these tests are not computed at once.
    monkeypatch.setattr(reference, "SCORE_BYTES", 2**16)
    monkeypatch.setattr(memory, "SCORE_BYTES", 2**16)
    folder = checkpoint(name)
    for shard in make_shards(read_spec(folder), tp)[:: max(1, tp - 1)]:
        for tokens, context, sampled in ((250, 250, 1), (60, 250, 1), (120, 120, 120))[: 3 if tp == 1 else 1]:
            found = measured(folder, shard, dtype, tokens, context, sampled)
            plan = planned(folder, shard, dtype, StepSize(tokens, sampled))
            bound = plan.activations + context * plan.context_token
            assert found <= bound
            assert bound <= 4 * found  # the bound is not too large either


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "quantization"),
    [("llama3", "int8"), ("opt_350m", "int8"), ("mixtral", "int8"), ("deepseek_v3", "int8"), ("mixtral", "int4-g32")],
)
def test_a_step_with_quantized_weights_takes_no_more_than_planned(
    checkpoint: Checkpoint, name: str, quantization: str, dtype: torch.dtype
) -> None:
    folder = checkpoint(name)
    for shard in make_shards(read_spec(folder), 2):
        found = measured(folder, shard, dtype, 250, 250, 1, quantization)
        plan = planned(folder, shard, dtype, StepSize(250, 1), quantization)
        assert found <= plan.activations + 250 * plan.context_token


@pytest.mark.parametrize("kv", ["int8", "fp8_e4m3"])
@pytest.mark.parametrize("name", ["llama3", "gemma2", "opt_350m", "deepseek_v3"])
def test_a_step_with_a_small_kv_cache_takes_no_more_than_planned(checkpoint: Checkpoint, name: str, kv: str) -> None:
    folder = checkpoint(name)
    for shard in make_shards(read_spec(folder), 2):
        for tokens in (250, 20):
            found = measured(folder, shard, torch.bfloat16, tokens, 250, 1, kv=kv)
            plan = planned(folder, shard, torch.bfloat16, StepSize(tokens, 1), kv=kv)
            assert found <= plan.activations + 250 * plan.context_token


@pytest.mark.parametrize(("name", "wanted"), [("llama3", "int8"), ("mixtral", "int8"), ("llama3", "int4")])
def test_loading_quantized_weights_holds_one_plain_matrix_at_a_time(
    checkpoint: Checkpoint, name: str, wanted: str
) -> None:
    """Beside the weights there are at most one matrix as it is stored, two more of its size in float32 while it is
    quantized, and a copy of its codes. Together these are less than the plain weights alone."""
    folder = checkpoint(name)
    spec, stored = read_spec(folder), open_checkpoint(folder)
    params = params_of(spec, stored.shapes, wanted)
    (shard,) = make_shards(spec, 1)
    weights = CheckpointWeights(stored, params, shard, torch.float32)
    tp = Axis("tp", 0, 1, LocalComm())
    with PeakOfLiveTensors() as mode:
        build_decoder(spec, shard, tp, weights, reference.ReferenceKernels(), torch.device("cpu"), 8)
    kept, plain = (
        planned(folder, shard, torch.float32, StepSize(1, 1), quantization).weights for quantization in (wanted, "")
    )
    largest = max(shard.param_size(param) for param in params)
    tables = 2 * 4 * 8 * spec.head_dim  # of rotary angles
    assert kept < mode.peak <= kept + tables + (3 * 4 + 1) * largest < plain


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_a_step_of_a_stage_takes_no_more_than_planned(
    checkpoint: Checkpoint, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The streams that a stage receives and sends exist at the same time as its activations."""
    monkeypatch.setattr(reference, "SCORE_BYTES", 2**16)
    monkeypatch.setattr(memory, "SCORE_BYTES", 2**16)
    folder, tokens = checkpoint(name), 120
    spec = read_spec(folder)
    stream = tokens * spec.hidden_size * 4
    for shard in rank_shards(spec, Layout(stages=balance_stages([1.0] * spec.num_layers, 3))):
        borders = (not shard.stage.first) + (not shard.stage.last)
        found = measured(folder, shard, torch.float32, tokens, tokens, 1) + borders * stream
        plan = planned(folder, shard, torch.float32, StepSize(tokens, 1))
        bound = plan.activations + tokens * plan.context_token
        assert found <= bound
        assert bound <= 4 * found


def test_the_planner_and_the_ranks_have_the_same_constants() -> None:
    assert memory.SCORE_BYTES == reference.SCORE_BYTES
    assert memory.PROMPT_ROWS == runner.PROMPT_ROWS


def single_rank_memory(spec: ModelSpec, folder: Path, **changes: int) -> RankMemory:
    (shard,) = make_shards(spec, 1)
    step = StepSize(**{"tokens": 64, "sampled": 8, **changes})
    params = make_manifest(spec, tensor_names(spec))
    return rank_memory(spec, params, shard, dtype="float32", device="cpu", block_size=BLOCK_SIZE, step=step)


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_weights_are_those_of_the_file(checkpoint: Checkpoint, name: str) -> None:
    """All tensors are counted, positions, biases and projections too; a tied embedding is counted again as the head."""
    folder = checkpoint(name)
    spec = read_spec(folder)
    entries = open_checkpoint(folder).tensors
    stored = {(entry.file, entry.offset): torch.Size(entry.shape).numel() * 4 for entry in entries.values()}
    params = make_manifest(spec, tensor_names(spec))
    embedding = next(param.pieces[0] for param in params if param.name == "embedding")
    again = math.prod(entries[embedding.source].shape) * 4 if spec.tie_embeddings else 0
    assert single_rank_memory(spec, folder).weights == sum(stored.values()) + again


class RecordedWeights(CheckpointWeights):
    """Weights that record the size of each tensor that is asked for, by its name."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.bytes: dict[str, int] = {}

    def tensor(self, name: str) -> Tensor:
        found = super().tensor(name)
        assert name not in self.bytes, "each tensor is asked for once"
        self.bytes[name] = found.nbytes
        return found


def loaded(folder: Path, layout: Layout, rank: int, shard: Shard) -> dict[str, int]:
    """Return the name and the bytes of every tensor that a rank reads from the file."""
    spec, checkpoint = read_spec(folder), open_checkpoint(folder)
    weights = RecordedWeights(checkpoint, make_manifest(spec, tensor_names(spec)), shard, torch.float32)
    tp = Axis("tp", rank % layout.tp, layout.tp, CopyingComm())
    build_decoder(spec, shard, tp, weights, reference.ReferenceKernels(), torch.device("cpu"), spec.max_positions)
    return weights.bytes


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_weights_are_those_that_a_rank_of_any_layout_reads(checkpoint: Checkpoint, name: str) -> None:
    """The planned weights of each rank are those that its part of the decoder asks for."""
    folder = checkpoint(name)
    spec = read_spec(folder)
    (whole,) = (loaded(folder, Layout(), 0, shard) for shard in rank_shards(spec, Layout()))
    for tp, pp in ((1, 3), (2, 2), (3, 1)):
        layout = Layout(tp, stages=balance_stages([1.0] * spec.num_layers, pp))
        stages: dict[str, int] = {}
        for rank, shard in enumerate(rank_shards(spec, layout)):
            read = loaded(folder, layout, rank, shard)
            plan = planned(folder, shard, torch.float32, StepSize(8, 8))
            assert plan.weights == sum(read.values())
            if tp == 1:
                assert not stages.keys() & read.keys(), "each tensor is in one stage"
                stages |= read
        assert tp > 1 or stages == whole  # a tied embedding is the table of the first stage and the head of the last


@pytest.mark.parametrize("strategy", ["linear", "round_robin"])
def test_whole_experts_are_read_where_they_are_placed(checkpoint: Checkpoint, strategy: ExpertPlacement) -> None:
    """5 experts over 2 replicas of 2 ranks."""
    folder = checkpoint("mixtral")
    spec = read_spec(folder)
    read: list[str] = []
    for replica in range(2):
        layout = Layout(2, stages=(2, 1), experts=strategy, replica=replica, replicas=2)
        for rank, shard in enumerate(rank_shards(spec, layout)):
            found = loaded(folder, layout, rank, shard)
            assert planned(folder, shard, torch.float32, StepSize(8, 8)).weights == sum(found.values())
            read += [name for name in found if ".experts." in name]
    params = make_manifest(spec, tensor_names(spec))
    assert sorted(read) == sorted(param.name for param in params if param.expert is not None)


def test_a_tied_embedding_on_a_gpu_is_on_the_first_and_the_last_stage(checkpoint: Checkpoint) -> None:
    """A rank with embedding and head holds the table once; with several stages, the first and the last hold a copy."""
    folder = checkpoint("llama3")
    spec, table = read_spec(folder), 301 * 64 * 4

    def weights(pp: int) -> list[int]:
        params = make_manifest(spec, tensor_names(spec))
        sizes: Any = {"dtype": "float32", "block_size": BLOCK_SIZE, "step": StepSize(8, 8)}
        shards = rank_shards(spec, Layout(stages=balance_stages([1.0] * spec.num_layers, pp)))
        return [rank_memory(spec, params, shard, device="cuda", **sizes).weights for shard in shards]

    (one,) = weights(1)
    assert sum(weights(2)) == sum(weights(3)) == one + table


def test_only_the_last_stage_has_logits(checkpoint: Checkpoint) -> None:
    """The step has so many rows that the logits are the fullest moment of the last stage."""
    folder = checkpoint("llama")
    shards = rank_shards(read_spec(folder), Layout(stages=(1, 1, 1)))
    first, middle, last = (planned(folder, shard, torch.float32, StepSize(512, 512)).activations for shard in shards)
    border = 512 * 64 * 4
    assert first <= middle < last
    assert middle == 2 * border + (first - border)
    assert last > 512 * 301 * 4


def test_larger_steps_need_more_memory(checkpoint: Checkpoint) -> None:
    folder = checkpoint("gemma2")
    spec = read_spec(folder)
    least = single_rank_memory(spec, folder)
    assert single_rank_memory(spec, folder, tokens=2048).activations > least.activations
    assert single_rank_memory(spec, folder, tokens=2048).context_token > least.context_token
    assert single_rank_memory(spec, folder, sampled=64).activations >= least.activations


def test_a_rank_with_a_draft_model_needs_the_memory_of_both() -> None:
    large, small = RankMemory(1000, 100, 10, 64), RankMemory(200, 30, 12, 16)
    assert large.with_draft(small) == RankMemory(1200, 130, 12, 80)


@pytest.mark.parametrize("size", [1, 16])
@pytest.mark.parametrize("length", [None, 40])
def test_the_kv_budget_leaves_room_for_all_else(size: int, length: int | None) -> None:
    rank = RankMemory(1000, 100, 10, 64 * size)
    left = rank.kv_budget(10_000, size, length)
    tokens = left // rank.block * size
    assert 1100 + left + 10 * min(tokens, length or tokens) <= 10_000
    assert rank.kv_budget(1099, size, length) < 0
