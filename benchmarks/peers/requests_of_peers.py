"""What the peers of `benchmarks/compare.py` have in common: a line of JSON for each case, and one for its times.

It imports nothing but the standard library, since peers have environments of their own.
"""

import json
import os
import random
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# What libraries print, from their import on, must not mix with the answers.
_answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def arguments() -> tuple[str, Mapping[str, Any]]:
    """Return the folder of the checkpoint and the settings of the engine: `python PEER FOLDER SETTINGS`."""
    return sys.argv[1], json.loads(sys.argv[2])


def serve(folder: str, generate: Callable[[list[list[int]], int], object]) -> None:
    """Answer cases from stdin until it ends. `generate` computes prompts of token ids, and this many tokens for each.

    A case has `batch`, `input_len` and `output_len`. The answer has the seconds of the prompts with one token each, and
    those of the other tokens. For these the same prompts are computed twice more, with one token and with all: engines
    that cache prompts then have little to compute but the tokens, so it is not a difference of two long, noisy times.
    """
    numbers = random.Random(0)
    vocabulary = json.loads((Path(folder) / "config.json").read_text())["vocab_size"]

    def seconds(prompts: list[list[int]], tokens: int) -> float:
        begun = time.perf_counter()
        generate(prompts, tokens)
        return time.perf_counter() - begun

    def prompts(batch: int, length: int) -> list[list[int]]:
        # The largest ids may be those of special tokens.
        return [[numbers.randrange(vocabulary * 9 // 10) for _ in range(length)] for _ in range(batch)]

    seconds(prompts(1, 16), 4)  # what is made at first use does not count
    print(json.dumps({"ready": True}), file=_answers, flush=True)
    for line in sys.stdin:
        case = json.loads(line)
        given = prompts(case["batch"], case["input_len"])
        times = {"prompt_s": seconds(given, 1)}
        if case["output_len"] > 1:
            first = seconds(given, 1)
            times["decode_s"] = seconds(given, case["output_len"]) - first
        print(json.dumps(times), file=_answers, flush=True)
