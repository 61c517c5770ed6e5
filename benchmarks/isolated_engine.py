"""Measuring an engine on given cores, in a separate process. Benchmarks of layouts use it."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shoal import LLM
from shoal.bench.engine_speed import BatchShape, SpeedMeter

_TIMEOUT_S = 1800


def measure(model: Path | str, cores: Sequence[int], shape: BatchShape, options: Mapping[str, Any]) -> dict[str, Any]:
    """Run a batch twice in a separate process that may use only these cores. Return the figures of the second run.

    `memory_bytes` has for each rank the anonymous memory without the KV cache and without the memory of an interpreter
    that has imported torch. `idle_share` has for each stage the share of time in which its ranks computed nothing, the
    mean over them.
    """
    arguments = json.dumps(
        [str(model), list(cores), [shape.batch_size, shape.input_len, shape.output_len], dict(options)]
    )
    done = subprocess.run(
        [sys.executable, __file__, arguments], stdout=subprocess.PIPE, check=True, text=True, timeout=_TIMEOUT_S
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _run(model: str, cores: Sequence[int], shape: BatchShape, options: dict[str, Any]) -> dict[str, Any]:
    os.sched_setaffinity(0, cores)
    with LLM(model, **options) as llm:
        meter = SpeedMeter(llm.engine, llm.vocab_size)
        meter.run(BatchShape(shape.batch_size, 16, 4))
        before = llm.stats()
        run = meter.run(shape)
        after = llm.stats()
        return {
            "output_tokens_per_s": run.output_tokens_per_s,
            "decode_tokens_per_s": run.decode_tokens_per_s,
            "time_to_first_token_s": run.time_to_first_token_s,
            "seconds": run.seconds,
            "num_blocks": after.num_blocks,
            "block_size": after.block_size,
            "preemptions": after.preemptions - before.preemptions,
            "weight_bytes": [rank.weight_bytes for rank in after.ranks],
            "memory_bytes": [rank.anonymous - rank.anonymous_at_import - rank.kv_bytes for rank in after.ranks],
            "idle_share": run.stage_idle,
        }


if __name__ == "__main__":
    model, cores, sizes, options = json.loads(sys.argv[1])
    print(json.dumps(_run(model, cores, BatchShape(*sizes), options)))
