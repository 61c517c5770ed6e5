"""What the peers of `benchmarks/compare.py` have in common: a line of JSON for each case, and one for its times.

It imports nothing but the standard library, since peers have environments of their own.
"""

import json
import os
import random
import sys
import time
from collections.abc import Callable

MAX_LEN = 6272  # the longest prompt and its output
MAX_BATCH = 32
KV_BYTES = 5 << 30  # for 8 sequences of 4,096 tokens and more
_VOCABULARY = 150_000

# What libraries print, from their import on, must not mix with the answers.
_answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def serve(generate: Callable[[list[list[int]], int], object]) -> None:
    """Answer cases from stdin until it ends. `generate` computes prompts of token ids, and this many tokens for each.

    A case has `batch`, `input_len` and `output_len`. The answer has the seconds of the first token and of all tokens.
    """
    numbers = random.Random(0)

    def prompts(batch: int, length: int) -> list[list[int]]:
        return [[numbers.randrange(_VOCABULARY) for _ in range(length)] for _ in range(batch)]

    generate(prompts(1, 16), 4)  # what is made at first use does not count
    print(json.dumps({"ready": True}), file=_answers, flush=True)
    for line in sys.stdin:
        case = json.loads(line)
        begun = time.perf_counter()
        generate(prompts(case["batch"], case["input_len"]), 1)
        first = time.perf_counter() - begun
        whole = first
        if case["output_len"] > 1:
            begun = time.perf_counter()
            generate(prompts(case["batch"], case["input_len"]), case["output_len"])
            whole = time.perf_counter() - begun
        print(json.dumps({"first_s": first, "whole_s": whole}), file=_answers, flush=True)
