"""Recorded decoding steps have the bits of steps that are computed operation by operation, for every family."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shoal.comm.base import Communicator
from shoal.comm.local import LocalComm
from shoal.comm.process_comm import ProcessComm
from shoal.comm.shared_memory_library import load_library
from shoal.comm.threads import ThreadComm, ThreadGroup
from shoal.comm.torch_distributed import c10d
from shoal.kernels.base import KVCache, PagedBatch
from shoal.kernels.native import load_native
from shoal.kernels.select import make_kernels
from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.models.checkpoint.loader import CheckpointWeights
from shoal.models.decoder import Decoder, build_decoder
from shoal.models.implementation import params_of
from shoal.models.manifest import Shard, make_shards
from shoal.models.registry import read_spec
from shoal.parallel.mesh import Axis
from shoal.wire.ranks import NewSeq, Sampling, StepPlan, Work
from shoal.wire.tokens import encode_tokens
from shoal.worker.decode_batch import DecodeBuffers
from shoal.worker.kv_cache import allocate
from shoal.worker.recorded_steps import MOST_TOKENS, RecordedSteps
from shoal.worker.sequence_table import SequenceTable
from support.checkpoints import MAKERS

NATIVE, WHY = load_native()
pytestmark = pytest.mark.skipif(NATIVE is None, reason=WHY)

BLOCK_SIZE, BLOCKS, SEQUENCES = 16, 3, 4
CPU = torch.device("cpu")
# The numbers of sequences of decoding steps: each size is recorded, then replayed with other inputs.
SIZES = (3, 1, 3, 4, 1, 4, 3)


def buffers() -> DecodeBuffers:
    return DecodeBuffers(MOST_TOKENS, BLOCKS, BLOCK_SIZE)


class Rank:
    """A rank's model, once with recordings and once without, each with a KV cache of its own."""

    def __init__(
        self, folder: Path, shard: Shard, tp: Axis, dtype: torch.dtype, quantization: str, kv: str = ""
    ) -> None:
        spec, checkpoint = read_spec(folder), open_checkpoint(folder)
        params = params_of(spec, checkpoint.shapes, quantization)
        weights = CheckpointWeights(checkpoint, params, shard, dtype)
        kernels, _ = make_kernels("cpu", dtype)
        self.decoder: Decoder = build_decoder(spec, shard, tp, weights, kernels, CPU, spec.max_positions)
        self.caches, self.plain = (
            allocate(spec, shard, BLOCKS * SEQUENCES, BLOCK_SIZE, kv or str(dtype).removeprefix("torch."), CPU).layers
            for _ in range(2)
        )
        self.steps = RecordedSteps(self.decoder, self.caches, buffers(), alone=tp.size == 1)

    def both(self, tokens: Sequence[int], batch: PagedBatch) -> tuple[Tensor, Tensor]:
        inputs = torch.tensor(tokens)
        return self.steps.hidden(inputs, batch, None), self.decoder.hidden(inputs, batch, self.plain, None)


def batch_of(sequences: Sequence[int], starts: Sequence[int], count: int) -> PagedBatch:
    """Return a batch with `count` tokens of each sequence, which begin at these positions."""
    every = torch.arange(SEQUENCES * BLOCKS, dtype=torch.int32).view(SEQUENCES, BLOCKS).flip(0)
    tables = every[list(sequences)]
    positions = torch.cat([torch.arange(start, start + count) for start in starts])
    rows = torch.arange(len(sequences)).repeat_interleave(count)
    contexts = [start + count for start in starts]
    width = -(-max(contexts) // BLOCK_SIZE)
    return PagedBatch(
        positions=positions,
        slots=tables[rows, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE,
        query_starts=torch.arange(0, len(positions) + 1, count, dtype=torch.int32),
        context_lens=torch.tensor(contexts, dtype=torch.int32),
        block_tables=tables[:, :width].contiguous(),
        block_size=BLOCK_SIZE,
        num_single=len(sequences) if count == 1 else 0,
        query_lens=(count,) * len(sequences),
        host_context_lens=tuple(contexts),
    )


@torch.inference_mode()
def run(rank: Rank) -> None:
    """Compute a prompt of 9 tokens for each sequence, then decoding steps of various sizes, up to the third block."""
    prompt = batch_of(range(SEQUENCES), [0] * SEQUENCES, 9)
    check(*rank.both([(7 * i) % 250 + 3 for i in range(9 * SEQUENCES)], prompt))
    lengths = [9, 14, 30, 31]  # the positions in between keep zeros as keys and values
    for turn, size in enumerate(SIZES):
        chosen = [(turn + i) % SEQUENCES for i in range(size)]
        tokens = [(31 * turn + 5 * i) % 250 + 3 for i in range(size)]
        check(*rank.both(tokens, batch_of(chosen, [lengths[i] for i in chosen], 1)))
        for i in chosen:
            lengths[i] += 1
    for recorded, plain in zip(rank.caches, rank.plain, strict=True):
        check_cache(recorded, plain)


def check(recorded: Tensor, plain: Tensor) -> None:
    assert torch.equal(recorded, plain)
    assert bool(plain.isfinite().all())


def check_cache(recorded: KVCache, plain: KVCache) -> None:
    assert torch.equal(recorded.keys, plain.keys)
    assert torch.equal(recorded.values, plain.values)


@pytest.mark.parametrize(
    ("name", "dtype", "quantization"),
    [
        *[(name, torch.bfloat16, "") for name in sorted(MAKERS)],
        *[(name, torch.float32, "") for name in ("gpt2", "llama_6_2", "phi3")],
        *[(name, torch.bfloat16, "int8") for name in ("gemma3", "llama", "mixtral")],
        *[(name, torch.bfloat16, "int4") for name in ("llama", "qwen2")],
    ],
)
def test_recorded_steps_have_the_same_bits(
    checkpoint: Callable[[str], Path], name: str, dtype: torch.dtype, quantization: str
) -> None:
    folder = checkpoint(name)
    (shard,) = make_shards(read_spec(folder), 1)
    rank = Rank(folder, shard, Axis("tp", 0, 1, LocalComm()), dtype, quantization)
    run(rank)
    assert sorted(rank.steps.recorded) == sorted(set(SIZES))


@pytest.mark.parametrize("kv", ["int8", "fp8_e4m3"])
def test_recorded_steps_read_and_write_small_kv_caches(checkpoint: Callable[[str], Path], kv: str) -> None:
    folder = checkpoint("qwen3")
    (shard,) = make_shards(read_spec(folder), 1)
    rank = Rank(folder, shard, Axis("tp", 0, 1, LocalComm()), torch.bfloat16, "", kv)
    run(rank)
    assert sorted(rank.steps.recorded) == sorted(set(SIZES))


def record_on_ranks(
    folder: Path, weights: tuple[int, ...], comm_of: Callable[[int], Communicator], quantization: str = ""
) -> list[dict[int, int]]:
    """Run a model on ranks that are threads, and return what each has recorded."""
    size = len(weights)

    def of(shard: Shard) -> dict[int, int]:
        comm = comm_of(shard.rank)
        try:
            rank = Rank(folder, shard, Axis("tp", shard.rank, size, comm), torch.bfloat16, quantization)
            run(rank)
        except BaseException:
            comm.abort()
            raise
        return rank.steps.recorded

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(of, make_shards(read_spec(folder), size, weights)))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mixtral"])
@pytest.mark.parametrize("weights", [(1, 1), (3, 1, 1, 9, 1, 1, 1, 1, 1, 1)])
def test_recorded_steps_add_over_ranks(checkpoint: Callable[[str], Path], name: str, weights: tuple[int, ...]) -> None:
    """Some of ten ranks have no heads, and decide for themselves whether they record."""
    group = ThreadGroup(len(weights), timeout_s=60)
    found = record_on_ranks(checkpoint(name), weights, lambda rank: ThreadComm(group, rank))
    assert max(map(len, found)) == len(set(SIZES))


@pytest.mark.skipif(load_library()[0] is None, reason=load_library()[1])
@pytest.mark.parametrize(("name", "quantization"), [("llama", "int8"), ("gemma2", "int8"), ("mixtral", "")])
def test_recorded_steps_add_in_shared_memory(checkpoint: Callable[[str], Path], name: str, quantization: str) -> None:
    """The layers of a rank whose linear layers are in C++ are one call from Python."""
    weights, store = (1, 2, 1), c10d.HashStore()

    def comm(rank: int) -> ProcessComm:
        return ProcessComm(store, "tp", rank, len(weights), requested="shm", timeout_s=60, device=CPU)

    found = record_on_ranks(checkpoint(name), weights, comm, quantization)
    assert [sorted(each) for each in found] == [sorted(set(SIZES))] * 3
    if quantization:
        assert {calls for each in found for calls in each.values()} == {1}


@torch.inference_mode()
def test_prompts_and_large_steps_are_not_recorded(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("llama")
    (shard,) = make_shards(read_spec(folder), 1)
    rank = Rank(folder, shard, Axis("tp", 0, 1, LocalComm()), torch.bfloat16, "")
    rank.both([3] * 2 * SEQUENCES, batch_of(range(SEQUENCES), [0] * SEQUENCES, 2))
    many = [i % SEQUENCES for i in range(MOST_TOKENS + 1)]
    rank.both([3] * len(many), batch_of(many, [5] * len(many), 1))
    assert rank.steps.recorded == {}


@torch.inference_mode()
def test_recordings_read_what_a_table_of_sequences_has_written(checkpoint: Callable[[str], Path]) -> None:
    """Plain steps are in the memory that recordings read, and other steps of the same size are copied there."""
    folder = checkpoint("llama")
    (shard,) = make_shards(read_spec(folder), 1)
    rank = Rank(folder, shard, Axis("tp", 0, 1, LocalComm()), torch.bfloat16, "")
    table = SequenceTable(SEQUENCES, BLOCKS * BLOCK_SIZE, BLOCK_SIZE, CPU)
    steps = RecordedSteps(rank.decoder, rank.caches, table.buffers, alone=True)
    new = tuple(NewSeq(seq, 0, encode_tokens([3 + seq, 5, 7]), 3, (), Sampling(seed=0)) for seq in (0, 1))
    kinds = []
    for start, count, masked in ((0, 3, False), (3, 1, False), (4, 1, True), (5, 1, False)):
        works = tuple(
            Work(seq, start, count, True, () if start else (seq,), masked=masked and seq == 1) for seq in (0, 1)
        )
        table.apply(StepPlan(0, start, works, () if start else new))
        step = table.build(works)
        wanted = rank.decoder.hidden(step.tokens, step.batch, rank.plain, step.logit_rows)
        assert torch.equal(steps.hidden(step.tokens, step.batch, step.logit_rows), wanted)
        for work in works:
            table.record(work, [11 + start + work.seq])
        kinds.append(step.plain)
    assert kinds == [False, True, False, True]
    assert list(steps.recorded) == [2]


@torch.inference_mode()
def test_nothing_is_recorded_if_that_is_switched_off(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("llama")
    (shard,) = make_shards(read_spec(folder), 1)
    rank = Rank(folder, shard, Axis("tp", 0, 1, LocalComm()), torch.bfloat16, "")
    steps = RecordedSteps(rank.decoder, rank.caches, buffers(), alone=True, enabled=False)
    steps.hidden(torch.tensor([3]), batch_of([0], [5], 1), None)
    assert steps.recorded == {}


@torch.inference_mode()
def test_a_trace_sees_the_layers_of_steps_that_were_recorded(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("llama")
    (shard,) = make_shards(read_spec(folder), 1)
    rank = Rank(folder, shard, Axis("tp", 0, 1, LocalComm()), torch.bfloat16, "")
    ended: list[int] = []

    class Watch:
        def began(self) -> None: ...

        def ended(self, layer: int) -> None:
            ended.append(layer)

    def step() -> Tensor:
        return rank.steps.hidden(torch.tensor([3]), batch_of([0], [5], 1), None)

    recorded = step()
    rank.decoder.watch_layers(Watch())
    assert torch.equal(step(), recorded)
    assert ended == list(range(len(rank.decoder.layers)))
    rank.decoder.watch_layers(None)
    assert torch.equal(step(), recorded)
    assert len(ended) == len(rank.decoder.layers)


@pytest.mark.slow
def test_an_engine_does_not_load_the_compiler_of_pytorch() -> None:
    """Loading it takes as long as starting the rank otherwise does."""
    program = """
import sys
from shoal import LLM, SamplingParams
with LLM(max_model_len=64, kv_cache_memory_bytes="2MiB") as llm:
    llm.generate("1 + 2 =", SamplingParams(max_tokens=8), use_tqdm=False)
assert "torch" in sys.modules
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
