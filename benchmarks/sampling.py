"""Measure native sampling and sampling with PyTorch, with the vocabulary of Qwen3-0.6B. Prints JSON.

    python benchmarks/sampling.py [--rows N] [--vocabulary N] [--scale S] [--threads N] [--seconds S]

Times are medians in microseconds of one call of `sample` (or `logprobs`) for all rows. Native and PyTorch are measured
in turn, so that other load on the machine affects both. The logits are normal with deviation S: with 3 a nucleus has
thousands of tokens, with 0.3 most of the vocabulary. The nuclei of a trained model have tens of tokens.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from shoal.comm.local import LocalComm
from shoal.kernels import sampling
from shoal.parallel.mesh import Axis
from shoal.worker import logit_edits as worker_edits
from shoal.worker import sampler
from shoal.worker.logit_edits import Bias, Edits, Masks, Pairs, Penalties
from shoal.worker.random import row_keys, split_keys
from shoal.worker.sampler import SamplingRows, VocabShare, logprobs, sample

ALONE = Axis("tp", 0, 1, LocalComm())
HISTORY, BIASED, FORBIDDEN = 200, 20, 5  # pairs per row
MIN_CALLS = 5


def rows_of(
    count: int, temperature: float, top_k: int, top_p: float, min_p: float, edits: Edits | None = None
) -> SamplingRows:
    zeros = np.zeros(count, np.uint64)
    keys = split_keys(row_keys(zeros, zeros, np.arange(count, dtype=np.uint64)))
    truncated = temperature > 0 and (top_k > 0 or top_p < 1 or min_p > 0)
    return SamplingRows(
        temperature=torch.full((count,), temperature),
        top_k=torch.full((count,), top_k),
        top_p=torch.full((count,), top_p),
        min_p=torch.full((count,), min_p),
        keys=keys,
        greedy=temperature == 0,
        truncated=range(count) if truncated else [],
        logprobs=-1,
        edits=edits,
    )


def some_pairs(count: int, each: int, vocabulary: int) -> Pairs:
    ids = torch.stack([torch.randperm(vocabulary)[:each] for _ in range(count)])
    return Pairs(torch.arange(count).repeat_interleave(each), ids.flatten())


def every_edit(count: int, vocabulary: int) -> Edits:
    seen, biased = some_pairs(count, HISTORY, vocabulary), some_pairs(count, BIASED, vocabulary)
    counts = torch.randint(0, 4, (len(seen.rows),), dtype=torch.int32)
    strength = torch.full((count,), 0.3)
    return Edits(
        forbidden=some_pairs(count, FORBIDDEN, vocabulary),
        bias=Bias(biased.rows, biased.ids, torch.randn(len(biased.rows))),
        penalties=Penalties(seen.rows, seen.ids, counts, strength, strength, 1 + strength),
    )


def cases(count: int, vocabulary: int) -> dict[str, SamplingRows]:
    masks = Masks(torch.arange(count), torch.randint(-(2**31), 2**31 - 1, (count, -(-vocabulary // 32))).int())
    return {
        "greedy": rows_of(count, 0.0, 0, 1.0, 0.0),
        "temperature": rows_of(count, 0.8, 0, 1.0, 0.0),
        "top_k 50": rows_of(count, 0.8, 50, 1.0, 0.0),
        "top_p 0.9": rows_of(count, 0.8, 0, 0.9, 0.0),
        "min_p 0.02": rows_of(count, 0.8, 0, 1.0, 0.02),
        "grammar": rows_of(count, 0.0, 0, 1.0, 0.0, Edits(masks=masks)),
        "everything": rows_of(count, 0.8, 50, 0.9, 0.02, every_edit(count, vocabulary)),
    }


def seconds_of(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def measure(source: Tensor, call: Callable[[Tensor], object], seconds: float) -> dict[str, float]:
    """Return the median of each implementation. Every call gets new logits, since edits are made in place."""
    native, _ = sampling.load_native()
    kernels: dict[str, sampling.SamplingKernels] = {"pytorch": sampling.TorchSampling()}
    if native is not None:
        kernels["native"] = native
    times: dict[str, list[float]] = {name: [] for name in kernels}
    logits = source.clone()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < MIN_CALLS:
        for name, implementation in kernels.items():
            sampler.sampling_kernels = worker_edits.sampling_kernels = lambda _, it=implementation: it  # type: ignore
            logits.copy_(source)
            times[name].append(seconds_of(lambda: call(logits)))
    return {name: round(statistics.median(found) * 1e6) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--scale", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each case")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    share = VocabShare(0, (options.vocabulary,))
    source = torch.randn(options.rows, options.vocabulary) * options.scale
    tokens = torch.randint(0, options.vocabulary, (options.rows,))
    found = {
        name: measure(source, lambda logits, rows=rows: sample(logits, share, ALONE, rows), options.seconds)  # type: ignore[misc]
        for name, rows in cases(options.rows, options.vocabulary).items()
    }
    found["logprobs 20"] = measure(source, lambda logits: logprobs(logits, share, ALONE, tokens, 20), options.seconds)
    print(json.dumps({"threads": torch.get_num_threads(), "microseconds": found}, indent=1))


if __name__ == "__main__":
    main()
