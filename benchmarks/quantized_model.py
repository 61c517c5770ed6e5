"""Compare a model with and without `--quantization`: speed on one core, and memory. Prints JSON.

    python benchmarks/quantized_model.py [MODEL] [--rounds N] [--formats FORMAT ...]

The default model has made-up weights with the sizes of Qwen3-0.6B. Each format runs in a process of its own, in turn,
with one thread. Seconds are those of the processor, so that other programs on the machine disturb little. A decode rate
comes from the difference between outputs of 17 tokens and of one.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from typing import Any

from shoal import LLM, SamplingParams

PROMPT, DECODED = 128, 16  # tokens
BATCHES = (1, 8, 32)


def processor_seconds(llm: LLM, batch: int, tokens: int, rng: random.Random) -> float:
    prompts: list[Any] = [
        {"prompt_token_ids": [rng.randrange(1000, 100000) for _ in range(PROMPT)]} for _ in range(batch)
    ]
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    start = time.process_time()
    llm.generate(prompts, params, use_tqdm=False)
    return time.process_time() - start


def measure(model: str, quantization: str | None) -> dict[str, Any]:
    """Return tokens per second of prompts and of decoding by batch size, seconds of loading, and MiB after it."""
    options: dict[str, Any] = {"load_format": "dummy"} if model.startswith("shape:") else {}
    start, rng = time.process_time(), random.Random(0)
    with LLM(
        model,
        quantization=quantization,
        cpu_cores="0",
        distributed_executor_backend="uni",
        kv_cache_memory_bytes="1GiB",
        max_model_len=2 * PROMPT,
        enable_prefix_caching=False,
        **options,
    ) as llm:
        found: dict[str, Any] = {"start_s": time.process_time() - start}
        rank = llm.stats().ranks[0]
        found["weights_mib"] = rank.weight_bytes / 2**20
        found["other_mib"] = (rank.anonymous - rank.anonymous_at_import - rank.kv_bytes - rank.weight_bytes) / 2**20
        for batch in BATCHES:
            first, all_tokens = (processor_seconds(llm, batch, tokens, rng) for tokens in (1, 1 + DECODED))
            found[f"prompt_tokens_per_s_{batch}"] = batch * PROMPT / first
            found[f"decode_tokens_per_s_{batch}"] = batch * DECODED / (all_tokens - first)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares a model with and without quantized weights.")
    parser.add_argument("model", nargs="?", default="shape:qwen3-0.6b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--formats", nargs="+", default=["plain", "int8", "int4", "int4-g32"])
    parser.add_argument("--one", help=argparse.SUPPRESS)  # for the processes of a comparison
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.model, None if options.one == "plain" else options.one)))
        return
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in options.formats}
    for _ in range(options.rounds):
        for kind, found in runs.items():
            command = [sys.executable, __file__, options.model, "--one", kind]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found.append(json.loads(done.stdout))
    medians = {
        kind: {name: round(statistics.median(run[name] for run in found), 1) for name in found[0]}
        for kind, found in runs.items()
    }
    print(json.dumps({"model": options.model, **medians}, indent=2))


if __name__ == "__main__":
    main()
