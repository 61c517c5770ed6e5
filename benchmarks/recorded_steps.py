"""Compare decoding steps of the layers of a rank: without recordings, recorded with sums in Python, and recorded.

    python benchmarks/recorded_steps.py [CONFIG] [--tp N] [--quantization int8] [--rounds N] [--batches 1,8,32]

Prints JSON. CONFIG is a folder with a config.json, or the name of a bundled shape; its weights are made up. The rank
has the share of one of N ranks, and adds over shared memory in a group of its own, so that it never waits. The kinds of
steps take turns. Times are medians over the rounds, in microseconds of the processor for a step, with one thread.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import shoal
from shoal.comm.local import LocalComm
from shoal.comm.shared_memory import SharedMemory, SharedMemoryComm
from shoal.kernels.base import PagedBatch
from shoal.kernels.select import make_kernels
from shoal.models.checkpoint.loader import DummyWeights
from shoal.models.decoder import Decoder, build_decoder
from shoal.models.implementation import params_of
from shoal.models.manifest import make_shards
from shoal.models.registry import read_spec
from shoal.parallel.mesh import Axis
from shoal.worker.decode_batch import DecodeBuffers
from shoal.worker.kv_cache import allocate
from shoal.worker.recorded_steps import MOST_TOKENS, RecordedSteps

BLOCK_SIZE, CONTEXT = 16, 64  # tokens
STEPS = 10  # of one kind in a row
CPU = torch.device("cpu")


class SumsInPython:
    """A communicator whose sums are recorded as calls from Python."""

    def __init__(self, inner: SharedMemoryComm) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def native_all_reduce(self, _: Tensor) -> None:
        return None


def decoding_batch(count: int) -> PagedBatch:
    """Return a batch with one token of each of `count` sequences, behind a context."""
    tables = torch.arange(count * CONTEXT // BLOCK_SIZE, dtype=torch.int32).view(count, -1)
    return PagedBatch(
        positions=torch.full((count,), CONTEXT - 1),
        slots=tables[:, -1].long() * BLOCK_SIZE + (CONTEXT - 1) % BLOCK_SIZE,
        query_starts=torch.arange(count + 1, dtype=torch.int32),
        context_lens=torch.full((count,), CONTEXT, dtype=torch.int32),
        block_tables=tables,
        block_size=BLOCK_SIZE,
        num_single=count,
        query_lens=(1,) * count,
        host_context_lens=(CONTEXT,) * count,
    )


@torch.inference_mode()
def run(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    torch.set_num_threads(1)
    bundled = Path(shoal.__file__).parent / "shapes" / options.config
    spec = read_spec(bundled if bundled.exists() else Path(options.config))
    shard, dtype = make_shards(spec, options.tp)[0], torch.bfloat16
    batches = [int(each) for each in options.batches.split(",")]
    params = params_of(spec, quantization=options.quantization)
    kernels, _ = make_kernels("cpu", dtype)
    caches = allocate(spec, shard, max(batches) * CONTEXT // BLOCK_SIZE, BLOCK_SIZE, "bfloat16", CPU).layers

    def decoder(tp: Any) -> Decoder:
        axis, weights = Axis("tp", 0, options.tp, tp), DummyWeights(params, shard, dtype, 0)
        return build_decoder(spec, shard, axis, weights, kernels, CPU, 2 * CONTEXT)

    comm = SharedMemoryComm(SharedMemory.make(1), 0, [os.getpid()], timeout_s=60) if options.tp > 1 else LocalComm()
    models = {"plain": decoder(comm), "recorded": decoder(comm)}
    if isinstance(comm, SharedMemoryComm):
        models["recorded, sums in Python"] = decoder(SumsInPython(comm))
    buffers = DecodeBuffers(MOST_TOKENS, 2 * CONTEXT // BLOCK_SIZE, BLOCK_SIZE)
    steps = {
        kind: RecordedSteps(model, caches, buffers, alone=False, enabled=kind != "plain")
        for kind, model in models.items()
    }
    times: dict[str, dict[int, list[float]]] = {kind: {count: [] for count in batches} for kind in steps}
    for turn in range(1 + options.rounds):  # the first one records
        for count in batches:
            tokens, batch = torch.arange(count) % 100 + 3, decoding_batch(count)
            for kind, each in steps.items():
                begun = time.thread_time()
                for _ in range(STEPS):
                    each.hidden(tokens, batch, None)
                if turn:
                    times[kind][count].append((time.thread_time() - begun) / STEPS * 1e6)
    medians = {
        kind: {f"batch {count}": round(statistics.median(found), 1) for count, found in of_kind.items()}
        for kind, of_kind in times.items()
    }
    for kind, each in steps.items():
        if each.recorded:
            medians[f"{kind}: calls from Python"] = {f"batch {n}": float(calls) for n, calls in each.recorded.items()}
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares decoding steps with and without recordings.")
    parser.add_argument("config", nargs="?", default="llama-10m")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--quantization", default="")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--batches", default="1,8,32")
    options = parser.parse_args()
    print(json.dumps(run(options), indent=2))


if __name__ == "__main__":
    main()
