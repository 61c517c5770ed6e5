"""Measure what sampling, several outputs and speculation cost or save: `python benchmarks/offline.py [--part PART]`.

It prints JSON. The model has random weights with the sizes of Qwen3-0.6B in bfloat16. Each part runs two variants in
one process, in turn, `--rounds` times. Ratios are computed round by round, and figures are medians.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from checkpoint import make
from shoal import LLM, SamplingParams
from shoal.launch.open_model import open_model
from shoal.wire.engine import SeqUpdate

_SHAPE = "shape:qwen3-0.6b"
_TEXT = 48  # tokens after which a copied text starts again
_EVERYTHING: dict[str, Any] = {
    "temperature": 0.8,
    "top_k": 50,
    "top_p": 0.9,
    "min_p": 0.02,
    "presence_penalty": 0.3,
    "frequency_penalty": 0.3,
    "repetition_penalty": 1.1,
    "logit_bias": {7: 1.0, 11: -1.0},
    "min_tokens": 4,
    "stop_token_ids": [3],
    "seed": 1,
}


def _prompts(count: int, length: int, seed: int) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {"prompt_token_ids": torch.randint(10, 150_000, (length,), generator=generator).tolist()} for _ in range(count)
    ]


@contextmanager
def _watched(llm: LLM, look: Callable[[list[SeqUpdate]], None]) -> Iterator[None]:
    """Have `look` see all updates of the engine inside."""
    engine: Any = llm.engine
    updates = engine.updates

    def watched(timeout: float) -> list[SeqUpdate]:
        found: list[SeqUpdate] = updates(timeout)
        look(found)
        return found

    engine.updates = watched
    try:
        yield
    finally:
        engine.updates = updates


def _decode_rate(llm: LLM, prompts: Sequence[Any], params: SamplingParams) -> float:
    """Return tokens per second from the time when every request has its first token until the last token."""
    firsts: set[int] = set()
    begun, ended, counted = 0.0, 0.0, 0

    def look(found: list[SeqUpdate]) -> None:
        nonlocal begun, ended, counted
        ended = time.perf_counter()
        counted += sum(len(update.tokens) for update in found) if begun else 0
        firsts.update(update.seq for update in found if update.tokens)
        if not begun and len(firsts) == len(prompts):
            begun = ended

    with _watched(llm, look):
        llm.generate(prompts, params, use_tqdm=False)
    return counted / (ended - begun)


def sampling(folder: Path, rounds: int) -> dict[str, Any]:
    """Compare decoding of 32 requests with every sampling parameter on, and greedy."""
    rates: dict[str, list[float]] = {"greedy": [], "every parameter": []}
    kinds = {"greedy": {"temperature": 0}, "every parameter": _EVERYTHING}
    options = {"max_model_len": 256, "kv_cache_memory_bytes": "1GiB"}
    with LLM(open_model(str(folder), options, own_process=True)) as llm:
        for number in range(rounds + 1):
            for name, kind in kinds.items():
                prompts = _prompts(32, 128, seed=number)
                found = _decode_rate(llm, prompts, _params(kind, 64))
                if number:  # the first run warms up
                    rates[name].append(found)
    ratios = [b / a for a, b in zip(*rates.values(), strict=True)]
    return {"tokens_per_s": {k: statistics.median(v) for k, v in rates.items()}, "ratio": statistics.median(ratios)}


def _params(kind: dict[str, Any], tokens: int) -> SamplingParams:
    merged = {**kind, "min_tokens": min(kind.get("min_tokens", 0), tokens)}
    return SamplingParams(max_tokens=tokens, ignore_eos=True, **merged)


def shared_prompt(folder: Path, rounds: int) -> dict[str, Any]:
    """Compare the KV blocks that a prompt of 1,024 tokens takes with one output and with eight."""
    options = {"max_model_len": 1280, "kv_cache_memory_bytes": "1GiB"}
    used = {}
    for n in (1, 8):
        with LLM(open_model(str(folder), options, own_process=True)) as llm:
            peak = _peak_blocks(llm, SamplingParams(n=n, max_tokens=8, seed=1), _prompts(1, 1024, seed=n)[0])
        used[n] = {"blocks": peak, "of the outputs": n, "of the prompt": peak - n}
    return {"blocks": used, "ratio": used[8]["of the prompt"] / used[1]["of the prompt"]}


def _peak_blocks(llm: LLM, params: SamplingParams, prompt: Any) -> int:
    """Return the most KV blocks that are held during a request."""
    free, peak = llm.stats().free_blocks, 0

    def look(_: list[SeqUpdate]) -> None:
        nonlocal peak
        peak = max(peak, free - llm.stats().free_blocks)

    with _watched(llm, look):
        list(llm.run([llm.prepare(0, prompt, params)]))
    return peak


def speculation(folder: Path, rounds: int) -> dict[str, Any]:
    """Compare decoding of one request whose text repeats its prompt, with and without n-gram drafts."""
    copying = _copying(folder)
    text = list(range(1000, 1000 + _TEXT))
    prompt: Any = {"prompt_token_ids": text + text[: _TEXT // 2]}
    rates: dict[str, list[float]] = {"plain": [], "ngram": []}
    accepted = 0.0
    for _ in range(rounds):
        for name, found in rates.items():
            speculative = {"method": "ngram", "num_speculative_tokens": 5} if name == "ngram" else None
            options = {
                "max_model_len": 512,
                "kv_cache_memory_bytes": "256MiB",
                "speculative_config": speculative,
                "enable_prefix_caching": False,
            }
            with LLM(open_model(str(copying), options, own_process=True)) as llm:
                _decode_rate(llm, [prompt], _params({"temperature": 0}, 16))
                found.append(_decode_rate(llm, [prompt], _params({"temperature": 0}, 128)))
                output = llm.generate(prompt, _params({"temperature": 0}, _TEXT), use_tqdm=False)[0].outputs[0]
                assert list(output.token_ids) == text[_TEXT // 2 :] + text[: _TEXT // 2], "the model does not copy"
                stats = llm.stats()
                if stats.draft_tokens:
                    accepted = stats.accepted_tokens / stats.draft_tokens
    ratios = [b / a for a, b in zip(*rates.values(), strict=True)]
    return {
        "tokens_per_s": {k: statistics.median(v) for k, v in rates.items()},
        "accepted": accepted,
        "ratio": statistics.median(ratios),
    }


def _copying(folder: Path) -> Path:
    """Return the checkpoint with another output head, after which token t is followed by t + 1, modulo _TEXT tokens."""
    target = folder.with_name(folder.name + "-copying")
    if (target / "model-head.safetensors").exists():
        return target
    target.mkdir(exist_ok=True)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for name in set(index["weight_map"].values()):
        if not (target / name).exists():
            (target / name).symlink_to((folder / name).resolve())
    source = index["weight_map"]["model.embed_tokens.weight"]
    with safe_open(folder / source, "pt") as file:
        embedding = file.get_tensor("model.embed_tokens.weight")
    # The rows are far apart, and larger than what the layers add, so that the last token decides.
    generator = torch.Generator().manual_seed(1)
    words = torch.randn((_TEXT, embedding.shape[1]), generator=generator) * 20
    embedding = embedding.clone()
    embedding[1000 : 1000 + _TEXT] = words.to(embedding.dtype)
    head = torch.zeros_like(embedding)
    head[1000 : 1000 + _TEXT] = embedding[1000 : 1000 + _TEXT].roll(1, 0)
    save_file({"model.embed_tokens.weight": embedding, "lm_head.weight": head}, target / "model-head.safetensors")
    weight_map = {**index["weight_map"], "model.embed_tokens.weight": "model-head.safetensors"}
    weight_map["lm_head.weight"] = "model-head.safetensors"
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    return target


PARTS = {"sampling": sampling, "shared_prompt": shared_prompt, "speculation": speculation}


@click.command()
@click.option("--part", "parts", type=click.Choice(list(PARTS)), multiple=True, help="which; all of them otherwise")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="where the checkpoint is, or is made")
def main(parts: tuple[str, ...], rounds: int, folder: Path | None) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        model = make(_SHAPE, folder or Path(temporary) / "model")
        print(json.dumps({name: PARTS[name](model, rounds) for name in parts or PARTS}, indent=2))


if __name__ == "__main__":
    main()
