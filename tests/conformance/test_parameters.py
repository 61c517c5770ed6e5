"""Tests of sampling parameters: their results are the same in every layout, and those of transformers."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from conformance.test_greedy_tokens import LOGPROB_TOLERANCE, NEAR_TIE, make_prompts
from shoal import LLM, RequestOutput, SamplingParams
from support.checkpoints import Reference

pytestmark = pytest.mark.slow

Checkpoint = Callable[[str], Path]

PROMPTS = make_prompts([3, 17, 40], seed=21)
ROOM = 2**21
EVERYTHING: dict[str, Any] = {
    "temperature": 1.1,
    "top_k": 80,
    "top_p": 0.95,
    "min_p": 0.01,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.3,
    "repetition_penalty": 1.2,
    "logit_bias": {5: 3.0, 9: -100.0},
    "min_tokens": 6,
    "max_tokens": 16,
    "seed": 11,
}


def open_llm(folder: Path, tp: int = 1, **options: Any) -> LLM:
    backend = "uni" if tp == 1 else "threads"
    defaults = {"distributed_executor_backend": backend, "kv_cache_memory_bytes": ROOM}
    return LLM(str(folder), tensor_parallel_size=tp, **{**defaults, **options})


def run(llm: LLM, prompts: Sequence[Sequence[int]], params: Any) -> list[RequestOutput]:
    return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)


def tokens_of(outputs: Sequence[RequestOutput]) -> list[list[tuple[int, ...]]]:
    return [[each.token_ids for each in output.outputs] for output in outputs]


# --- log-probabilities -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tp", "options"),
    [
        (1, {}),
        (3, {"max_num_batched_tokens": 7}),
        (2, {"max_num_batched_tokens": 16, "speculative_config": {"method": "ngram"}}),
    ],
)
def test_prompt_logprobs(checkpoint: Checkpoint, tp: int, options: dict[str, Any]) -> None:
    """Every token but the first has one, for any chunks, and even if the prompt is in the prefix cache."""
    folder = checkpoint("llama")
    with open_llm(folder, tp, **options) as llm:
        params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=2, ignore_eos=True)
        for _ in range(2):
            for prompt, output in zip(PROMPTS, run(llm, PROMPTS, params), strict=True):
                check_prompt_logprobs(folder, prompt, output)


def check_prompt_logprobs(folder: Path, prompt: Sequence[int], output: RequestOutput) -> None:
    found = output.prompt_logprobs
    assert found is not None
    assert len(found) == len(prompt)
    assert found[0] is None
    rows = Reference(folder).logprobs_of(prompt[:1], prompt[1:])
    for row, token, entries in zip(rows, prompt[1:], found[1:], strict=True):
        assert entries is not None
        assert abs(entries[token].logprob - float(row[token])) < LOGPROB_TOLERANCE
        best = row.topk(2).values.tolist()
        ranked = sorted((each.rank or 0, each.logprob) for each in entries.values())
        assert [logprob for _, logprob in ranked[:2]] == pytest.approx(best, abs=LOGPROB_TOLERANCE)
        larger = int((row > row[token] + LOGPROB_TOLERANCE).sum())
        near = int(((row - row[token]).abs() <= LOGPROB_TOLERANCE).sum())
        assert larger < (entries[token].rank or 0) <= larger + near


def test_logprobs_of_the_whole_vocabulary(checkpoint: Checkpoint) -> None:
    with open_llm(checkpoint("llama"), 2) as llm:
        (output,) = run(llm, PROMPTS[:1], SamplingParams(max_tokens=1, logprobs=-1, ignore_eos=True))
    logprobs = output.outputs[0].logprobs
    assert logprobs is not None
    assert sorted(logprobs[0]) == list(range(301))
    assert sum(torch.tensor(each.logprob).double().exp() for each in logprobs[0].values()) == pytest.approx(1, abs=1e-5)
    assert sorted(each.rank or 0 for each in logprobs[0].values()) == list(range(1, 302))


# --- draws -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tp", "options"),
    [
        (2, {}),
        (3, {"max_num_batched_tokens": 7, "enable_prefix_caching": False}),
        (1, {"speculative_config": {"method": "ngram", "prompt_lookup_min": 1, "num_speculative_tokens": 4}}),
        (2, {"kv_cache_memory_bytes": 2 * 3 * 16 * 2 * 8 * 4 * 6, "max_model_len": 80}),
    ],
    ids=["tp2", "chunks", "guesses", "preemption"],
)
def test_every_parameter_draws_the_same_in_every_layout(checkpoint: Checkpoint, tp: int, options: Any) -> None:
    """float32 sums differ by 1e-5 between layouts. A draw would differ if two candidates were so close, which does not
    happen with these seeds."""
    folder = checkpoint("llama")
    params = SamplingParams(n=3, **EVERYTHING)
    with open_llm(folder) as llm:
        expected = tokens_of(run(llm, PROMPTS, params))
    assert len({tokens for outputs in expected for tokens in outputs}) == 9
    with open_llm(folder, tp, **options) as llm:
        assert tokens_of(run(llm, PROMPTS, params)) == expected


@pytest.mark.slow
def test_repetition_penalty_is_that_of_transformers(checkpoint: Checkpoint) -> None:
    folder = checkpoint("llama")
    reference = Reference(folder).model
    with open_llm(folder, 2) as llm:
        params = SamplingParams(temperature=0, max_tokens=20, repetition_penalty=1.7, ignore_eos=True, min_tokens=20)
        outputs = run(llm, PROMPTS, params)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        theirs = reference.generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=20,
            min_new_tokens=20,
            repetition_penalty=1.7,
            output_scores=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
        expected, ours = theirs.sequences[0, len(prompt) :].tolist(), list(output.outputs[0].token_ids)
        if ours != expected:
            i = next(i for i in range(20) if ours[i] != expected[i])
            best, second = theirs.scores[i][0].topk(2).values.tolist()
            assert best - second < NEAR_TIE


@pytest.mark.slow
def test_frequency_and_presence_penalties_of_a_greedy_output(checkpoint: Checkpoint) -> None:
    """Each token is the likeliest by the model's own log-probabilities, minus the penalties of the tokens so far."""
    folder = checkpoint("llama")
    with open_llm(folder) as llm:
        params = SamplingParams(
            temperature=0, max_tokens=24, presence_penalty=1.5, frequency_penalty=0.7, ignore_eos=True
        )
        outputs = run(llm, PROMPTS, params)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        tokens = output.outputs[0].token_ids
        rows = Reference(folder).logprobs_of(prompt, tokens)
        for i, row in enumerate(rows):
            counts = torch.bincount(torch.tensor(tokens[:i], dtype=torch.int64), minlength=301)
            scores = row - 0.7 * counts - 1.5 * (counts > 0)
            assert float(scores.max() - scores[tokens[i]]) < NEAR_TIE


def test_no_output_ends_before_min_tokens(checkpoint: Checkpoint) -> None:
    folder = checkpoint("llama")
    with open_llm(folder) as llm:
        biased: dict[str, Any] = {"logit_bias": {2: 100.0}, "temperature": 0, "max_tokens": 12}
        (early,) = run(llm, PROMPTS[:1], SamplingParams(**biased))
        (late,) = run(llm, PROMPTS[:1], SamplingParams(min_tokens=7, **biased))
    assert early.outputs[0].token_ids == (2,)
    assert late.outputs[0].token_ids.index(2) == 7
    assert late.outputs[0].finish_reason == "stop"


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2])
def test_only_allowed_tokens_are_drawn(checkpoint: Checkpoint, tp: int) -> None:
    with open_llm(checkpoint("llama"), tp) as llm:
        params = SamplingParams(allowed_token_ids=[7, 290, 33], max_tokens=20, seed=1, ignore_eos=True)
        (output,) = run(llm, PROMPTS[:1], params)
    assert set(output.outputs[0].token_ids) == {7, 33, 290}


@pytest.mark.slow
def test_bad_words_are_not_drawn() -> None:
    with LLM(kv_cache_memory_bytes=ROOM) as llm:
        (plain,) = llm.generate("Count from 3 to 9:", SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)
        params = SamplingParams(temperature=0, max_tokens=24, bad_words=["5 6"])
        (other,) = llm.generate("Count from 3 to 9:", params, use_tqdm=False)
    assert "5 6" in plain.outputs[0].text
    assert "5 6" not in other.outputs[0].text
    assert other.outputs[0].text.startswith(" 3 4 5")


# --- several outputs of one prompt -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_outputs_share_the_prompts_blocks(checkpoint: Checkpoint, prefix_caching: bool) -> None:
    """64 prompt tokens take four blocks for one output and for six; later blocks belong to one output each."""
    (prompt,) = make_prompts([64], seed=4)
    with open_llm(checkpoint("llama"), enable_prefix_caching=prefix_caching) as llm:
        all_blocks = llm.stats().free_blocks
        used = []
        llm_run = llm.run([llm.prepare(0, {"prompt_token_ids": prompt}, SamplingParams(n=6, max_tokens=16, seed=1))])
        engine = llm.engine
        watched = engine.updates

        def updates(timeout: float) -> Any:
            found = watched(timeout)
            used.append(all_blocks - engine.stats().free_blocks)
            return found

        engine.updates = updates  # type: ignore[method-assign]
        ((_, output),) = llm_run
        assert len({each.token_ids for each in output.outputs}) == 6
        assert [each.index for each in output.outputs] == list(range(6))
        assert max(used) == 4 + 6
        assert llm.stats().free_blocks == all_blocks


@pytest.mark.slow
def test_outputs_of_one_prompt_are_the_same_with_any_neighbours(checkpoint: Checkpoint) -> None:
    with open_llm(checkpoint("llama")) as llm:
        params = SamplingParams(n=4, seed=5, max_tokens=10, ignore_eos=True)
        alone = tokens_of(run(llm, PROMPTS[1:2], params))
        together = tokens_of(run(llm, PROMPTS, params))
    assert together[1:2] == alone


# --- speculation -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("draft", "tp"), [("llama", 1), ("llama", 3), ("llama3", 2)])
def test_a_draft_model_changes_no_token(checkpoint: Checkpoint, draft: str, tp: int) -> None:
    """The model itself as draft model is always right, another model seldom; the output tokens never change."""
    folder = checkpoint("llama")
    many = [SamplingParams(temperature=0, max_tokens=18, ignore_eos=True), SamplingParams(n=2, **EVERYTHING)]
    with open_llm(folder, tp) as llm:
        expected = [tokens_of(run(llm, PROMPTS, params)) for params in many]
    speculative = {"model": str(checkpoint(draft)), "num_speculative_tokens": 3}
    with open_llm(folder, tp, speculative_config=speculative, max_num_batched_tokens=24) as llm:
        found = [tokens_of(run(llm, PROMPTS, params)) for params in many]
        stats = llm.stats()
    assert found == expected
    assert stats.draft_tokens > 0
    if draft == "llama":
        # Greedy drafts are all right; sampled drafts ignore penalties and truncation.
        assert stats.accepted_tokens / stats.draft_tokens > 0.5


@pytest.mark.slow
def test_ngram_drafts_save_steps_on_text_that_repeats(checkpoint: Checkpoint) -> None:
    folder = checkpoint("llama")
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, frequency_penalty=-2, presence_penalty=-2)
    found, steps = [], []
    for speculative in (None, {"method": "ngram", "num_speculative_tokens": 4}):
        with open_llm(folder, speculative_config=speculative) as llm:
            found.append(tokens_of(run(llm, PROMPTS[:1], params)))
            stats = llm.stats()
            steps.append(stats.steps)
    assert found[0] == found[1]
    assert stats.accepted_tokens > 0
    assert steps[1] == steps[0] - stats.accepted_tokens


def test_over_processes(checkpoint: Checkpoint) -> None:
    """Masks, drafts and prompt log-probabilities are sent between processes, too."""
    folder = checkpoint("llama")
    params = SamplingParams(n=2, prompt_logprobs=2, **EVERYTHING)
    with open_llm(folder) as llm:
        expected = tokens_of(run(llm, PROMPTS, params))
    speculative = {"model": str(folder), "num_speculative_tokens": 2}
    with open_llm(folder, 2, distributed_executor_backend="mp", speculative_config=speculative) as llm:
        outputs = run(llm, PROMPTS, params)
    assert tokens_of(outputs) == expected
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        check_prompt_logprobs(folder, prompt, output)


@pytest.mark.slow
def test_drafts_within_a_sliding_window(checkpoint: Checkpoint) -> None:
    """Blocks before the window are reused; a wrong draft moves the window back, but never to such a block."""
    folder = checkpoint("mistral")
    prompts = make_prompts([12 + i % 7 for i in range(12)], seed=9)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    found = []
    for speculative in (None, {"method": "ngram", "prompt_lookup_min": 1, "num_speculative_tokens": 6}):
        options: Any = {"block_size": 2, "max_num_seqs": 6, "kv_cache_memory_bytes": 2 * 3 * 2 * 4 * 8 * 4 * 70}
        with open_llm(folder, speculative_config=speculative, max_model_len=80, **options) as llm:
            found.append(tokens_of(run(llm, prompts, params)))
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_drafts_change_no_token_in_any_type(dtype: str) -> None:
    """A draft token has the same bits as a token that is computed alone, so near-ties have the same result, too. (Not
    so the sum over the vocabulary for log-probabilities, whose order depends on the number of rows.)"""
    prompts = [f"{a} + {b} =" for a in range(3, 60, 3) for b in (7,)] + ["Count from 1 to 9:", "Reverse: shoal ->"]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=0)
    found = []
    for speculative in (None, {"method": "ngram", "prompt_lookup_min": 1}):
        options: Any = {"kv_cache_memory_bytes": ROOM, "enable_prefix_caching": False, "dtype": dtype}
        with LLM(distributed_executor_backend="uni", speculative_config=speculative, **options) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            stats = llm.stats()
            found.append(outputs)
    assert stats.accepted_tokens > 0
    assert tokens_of(found[0]) == tokens_of(found[1])
    for plain, guessed in zip(*found, strict=True):
        expected = plain.outputs[0].cumulative_logprob
        assert guessed.outputs[0].cumulative_logprob == pytest.approx(expected, abs=1e-4)
