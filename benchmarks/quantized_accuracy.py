"""Measure what weights or a KV cache in fewer bits cost in accuracy, with the bundled models. Prints JSON.

    python benchmarks/quantized_accuracy.py [--model bundled:moe] [--questions N] [FORMAT ...]
    python benchmarks/quantized_accuracy.py [--model bundled:moe] [--questions N] --kv-cache-dtype TYPE ...

The model answers all additions that its training text lacks, and N questions of each other kind, with the weights as
they are stored and with each value of `--quantization`, or with a KV cache in each of some types. `right` is the share
of exact answers in percent. `logprob_error` is the mean difference in the log-probability of a token of a right answer,
in nats, without its sign.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from shoal import LLM, SamplingParams

sys.path.append(str(Path(__file__).parent.parent / "tools"))
from demo_text import END, TextMaker
from train_demo import held_out_questions

Questions = dict[str, list[tuple[str, str]]]  # kind -> prompts with their answers


def make_questions(count: int) -> Questions:
    maker = TextMaker(7)
    found = {"addition, held out": held_out_questions(maker.held_out)}
    for name in ("addition", "counting", "reversing", "sorting", "short_chat"):
        asked: dict[str, str] = {}
        while len(asked) < count:
            sample = getattr(maker, name)()
            wanted = sample.pieces[-1].text
            asked[sample.text.removesuffix(wanted)] = wanted.removesuffix(END)
        found[name] = list(asked.items())
    return found


def answer(model: str | None, questions: Questions, **options: Any) -> tuple[dict[str, float], list[float]]:
    """Return the percentage of right answers of each kind, and the log-probability of each token of them."""
    greedy = SamplingParams(temperature=0, max_tokens=160)
    shares, logprobs = {}, []
    with LLM(model, **options, kv_cache_memory_bytes="256MiB") as llm:
        for kind, asked in questions.items():
            outputs = llm.generate([prompt for prompt, _ in asked], greedy, use_tqdm=False)
            texts = [output.outputs[0].text for output in outputs]
            shares[kind] = 100 * statistics.mean(text == wanted for text, (_, wanted) in zip(texts, asked, strict=True))
            given: Any = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
            for output in llm.generate([prompt + wanted for prompt, wanted in asked[:50]], given, use_tqdm=False):
                rows = [row for row in output.prompt_logprobs or () if row is not None]
                logprobs += [row[token].logprob for row, token in zip(rows, output.prompt_token_ids[1:], strict=True)]
    return shares, logprobs


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures the accuracy of quantized weights with the bundled models.")
    parser.add_argument("formats", nargs="*", metavar="FORMAT", default=["int8", "int4", "int4-g64", "int4-g32"])
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--questions", type=int, default=400, help="of each kind but the additions")
    parser.add_argument("--kv-cache-dtype", nargs="+", default=[], help="compare these types of the KV cache")
    options = parser.parse_args()
    questions = make_questions(options.questions)
    model = None if options.model == "bundled" else options.model
    ways = {kv: {"kv_cache_dtype": kv} for kv in options.kv_cache_dtype}
    ways = ways or {name: {"quantization": name} for name in options.formats}
    plain, before = answer(model, questions)
    right = {kind: {"stored": round(plain[kind], 2)} for kind in questions}
    errors = {}
    for name, way in ways.items():
        small, after = answer(model, questions, **way)
        for kind in questions:
            right[kind][name] = round(small[kind], 2)
        errors[name] = round(statistics.mean(abs(a - b) for a, b in zip(before, after, strict=True)), 5)
    print(json.dumps({"model": options.model, "right": right, "logprob_error": errors}, indent=2))


if __name__ == "__main__":
    main()
