"""Tests of structured outputs of the bundled model at temperature 1: every output is valid, in every layout."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from shoal import LLM, SamplingParams
from shoal.outputs import CompletionOutput
from shoal.params import StructuredOutputsParams

pytestmark = pytest.mark.slow

PROMPTS = ["37 + 45 =", "Count from 3 to 9:", "Reverse: apple ->", "Sort: pear apple fig ->"]
SAMPLES = 6  # outputs per prompt
COLOURS = ["red", "green", "blue"]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": COLOURS}, "minItems": 1, "maxItems": 3},
        "good": {"type": "boolean"},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """Two ranks. test_pipeline.py shows that one draws the same."""
    options: dict[str, Any] = {"tensor_parallel_size": 2, "distributed_executor_backend": "threads"}
    with LLM(kv_cache_memory_bytes="16MiB", **options) as llm:
        yield llm


def samples(llm: LLM, *, max_tokens: int = 200, seed: int | None = 7, **kind: Any) -> list[CompletionOutput]:
    params = SamplingParams(
        temperature=1, n=SAMPLES, seed=seed, max_tokens=max_tokens, structured_outputs=StructuredOutputsParams(**kind)
    )
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert [output.error for output in outputs] == [None] * len(PROMPTS)
    return [sample for output in outputs for sample in output.outputs]


def finished(outputs: Sequence[CompletionOutput], max_tokens: int = 200) -> list[str]:
    """Return the complete texts. The others ended at their length, and are few."""
    for output in outputs:
        assert output.finish_reason in ("stop", "length")
        assert (output.finish_reason == "length") <= (len(output.token_ids) == max_tokens)
    texts = [output.text for output in outputs if output.finish_reason == "stop"]
    assert len(texts) > 0.8 * len(outputs)
    return texts


def check_person(text: str) -> None:
    value = json.loads(text)
    assert set(value) - {"good"} == {"name", "age", "tags"}
    assert isinstance(value["name"], str)
    assert len(value["name"]) <= 8
    assert type(value["age"]) is int
    assert 0 <= value["age"] <= 150
    assert 1 <= len(value["tags"]) <= 3
    assert set(value["tags"]) <= set(COLOURS)
    assert isinstance(value.get("good", True), bool)


def test_every_sample_obeys_a_schema(llm: LLM) -> None:
    texts = finished(samples(llm, json=SCHEMA))
    for text in texts:
        check_person(text)
    assert len(set(texts)) > len(texts) / 2  # most are different, since they are sampled


def test_a_schema_that_allows_one_text_is_that_text(llm: LLM) -> None:
    assert {json.loads(text) for text in finished(samples(llm, json={"const": 'a "b"\n'}))} == {'a "b"\n'}


def test_any_object(llm: LLM) -> None:
    # The schema sets no limit to the length; outputs that are not finished are left out.
    outputs = samples(llm, json_object=True, max_tokens=120)
    texts = [output.text for output in outputs if output.finish_reason == "stop"]
    assert all(isinstance(json.loads(text), dict) for text in texts)
    assert all(output.text.startswith("{") for output in outputs)


@pytest.mark.parametrize("pattern", [r"[a-z]{3,8}@[a-z]{2,5}\.(com|org)", r"\d{3}-\d{4}", r"(ab|c){0,9}d", "yes|no"])
def test_every_sample_matches_a_regex(llm: LLM, pattern: str) -> None:
    for text in finished(samples(llm, regex=pattern)):
        assert re.fullmatch(pattern, text)


def test_every_sample_is_one_of_the_choices(llm: LLM) -> None:
    choices = ["red", "red wine", "日本", '"quoted"', "two\nlines"]
    texts = finished(samples(llm, choice=choices))
    assert set(texts) <= set(choices)
    assert len(set(texts)) > 1


def depth(text: str) -> int:
    """Return how deep the parentheses of a sum are nested. Fails if they do not match."""
    level = deepest = 0
    for char in text:
        level += (char == "(") - (char == ")")
        assert level >= 0
        deepest = max(deepest, level)
    assert level == 0
    return deepest


def test_every_sample_obeys_a_grammar(llm: LLM) -> None:
    grammar = """
        start: "(" inner ")"
        inner: NUMBER | "(" NUMBER "+" NUMBER ")"
        NUMBER: /[0-9]{1,4}/
    """
    for text in finished(samples(llm, grammar=grammar)):
        assert re.fullmatch(r"\(\d{1,4}\)|\(\(\d{1,4}\+\d{1,4}\)\)", text)
        assert depth(text) in (1, 2)


def test_other_seeds_give_other_outputs_and_the_same_seed_the_same(llm: LLM) -> None:
    """The first few tokens of each output are enough for the comparison."""
    drawn = (samples(llm, max_tokens=20, json=SCHEMA, seed=seed) for seed in (1, 1, 2))
    first, again, other = ([sample.text for sample in each] for each in drawn)
    assert first == again
    assert first != other


def test_greedy_outputs_obey_as_well(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=200, structured_outputs=StructuredOutputsParams(json=SCHEMA))
    for output in llm.generate(PROMPTS, params, use_tqdm=False):
        if output.outputs[0].finish_reason == "stop":
            check_person(output.outputs[0].text)
