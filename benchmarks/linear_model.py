"""Compare a model in bfloat16 with our linear layers and the same with oneDNN's, on one core. Prints JSON.

    python benchmarks/linear_model.py [MODEL] [--seconds S]

The default model has made-up weights with the sizes of Qwen3-0.6B. Both are in this process and run in turn, with one
thread. Times are medians in milliseconds of the processor, so that other programs on the machine disturb little. A
decode step is a share of the difference between outputs of 9 tokens and of one.
"""

import argparse
import json
import random
import statistics
import time
from typing import Any
from unittest.mock import patch

from shoal import LLM, SamplingParams
from shoal.kernels import linear

SHORT, DECODED = 16, 8  # tokens
PROMPTS, BATCHES = (128, 500), (1, 8, 32)


def make_model(model: str) -> LLM:
    options: dict[str, Any] = {"load_format": "dummy"} if model.startswith("shape:") else {}
    return LLM(
        model,
        cpu_cores="0",
        distributed_executor_backend="uni",
        kv_cache_memory_bytes="512MiB",
        max_model_len=2 * max(PROMPTS),
        enable_prefix_caching=False,
        **options,
    )


def milliseconds(llm: LLM, batch: int, prompt: int, tokens: int, rng: random.Random) -> float:
    prompts: list[Any] = [
        {"prompt_token_ids": [rng.randrange(1000, 100000) for _ in range(prompt)]} for _ in range(batch)
    ]
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    start = time.process_time()
    llm.generate(prompts, params, use_tqdm=False)
    return (time.process_time() - start) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares models with our linear layers and with oneDNN's.")
    parser.add_argument("model", nargs="?", default="shape:qwen3-0.6b")
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    rng = random.Random(0)
    with patch.object(linear, "load_bf16", return_value=(None, "")):
        models = {"oneDNN": make_model(options.model)}
    models["ours"] = make_model(options.model)
    found: dict[str, dict[str, list[float]]] = {}
    end = time.perf_counter() + options.seconds
    while time.perf_counter() < end:
        for name, llm in models.items():
            for prompt in PROMPTS:
                taken = milliseconds(llm, 1, prompt, 1, rng)
                found.setdefault(f"prompt of {prompt}", {}).setdefault(name, []).append(taken)
            for batch in BATCHES:
                first, all_tokens = (milliseconds(llm, batch, SHORT, tokens, rng) for tokens in (1, 1 + DECODED))
                step = (all_tokens - first) / DECODED
                found.setdefault(f"decode step, batch {batch}", {}).setdefault(name, []).append(step)
    medians = {
        what: {name: round(statistics.median(times), 1) for name, times in of_what.items()}
        for what, of_what in found.items()
    }
    print(json.dumps({"model": options.model, "ms": medians}, indent=2))
    for llm in models.values():
        llm.close()


if __name__ == "__main__":
    main()
