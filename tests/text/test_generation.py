"""The defaults for generation that a model's folder contains."""

from pathlib import Path
from typing import Any

import pytest

from shoal.errors import CheckpointError
from shoal.params import SamplingParams
from shoal.text.generation_config import GenerationDefaults
from support.tokenizers import write


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, ()),
        ({"config.json": {"eos_token_id": 2}}, (2,)),
        ({"config.json": {"eos_token_id": None}}, ()),
        ({"config.json": {"eos_token_id": -1}}, ()),
        ({"generation_config.json": {"eos_token_id": [3, 2]}, "config.json": {"eos_token_id": 2}}, (3, 2)),
        ({"generation_config.json": {"eos_token_id": 3}, "config.json": {"eos_token_id": [2, 3]}}, (3, 2)),
    ],
)
def test_end_tokens_come_from_both_files(files: dict[str, Any], expected: tuple[int, ...], tmp_path: Path) -> None:
    assert GenerationDefaults.open(write(tmp_path, files)).eos == expected


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, {}),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20},
            {"temperature": 0.6, "top_p": 0.95, "top_k": 20},
        ),
        ({"temperature": 0.7, "min_p": 0.1}, {"temperature": 0.7, "min_p": 0.1}),  # do_sample is often left out
        ({"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"max_new_tokens": 100, "max_length": 20, "temperature": None, "bos_token_id": 1}, {"max_tokens": 100}),
    ],
)
def test_sampling_defaults_come_from_generation_config(
    generation: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    found = GenerationDefaults.open(write(tmp_path, {"generation_config.json": generation}))
    assert found.sampling == expected
    assert found.defaults() == SamplingParams(**expected)
    base = SamplingParams(seed=7, temperature=0.1)
    assert found.defaults(base) == SamplingParams(**{"seed": 7, "temperature": 0.1, **expected})


def test_sampling_defaults_are_not_read_unless_asked_for(tmp_path: Path) -> None:
    write(tmp_path, {"generation_config.json": {"eos_token_id": 3, "temperature": "hot"}})
    found = GenerationDefaults.open(tmp_path, sampling=False)
    assert (found.eos, found.sampling) == ((3,), {})


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config.json": "{"}, r"generation_config\.json can't be read"),
        ({"config.json": "[]"}, r"config\.json is not a JSON object"),
        ({"generation_config.json": {"eos_token_id": "</s>"}}, r"generation_config\.json: eos_token_id must be"),
        ({"config.json": {"eos_token_id": [1, True]}}, r"config\.json: eos_token_id must be"),
        ({"generation_config.json": {"temperature": "hot"}}, r"generation_config\.json: temperature must be .*'hot'"),
        ({"generation_config.json": {"top_p": 1.5}}, r"generation_config\.json: top_p must be in \(0, 1\].*got 1\.5"),
        ({"generation_config.json": {"max_new_tokens": 0}}, r"generation_config\.json: max_tokens must be at least 1"),
    ],
)
def test_malformed_files_and_values_are_named(files: dict[str, Any], expected: str, tmp_path: Path) -> None:
    write(tmp_path, files)
    with pytest.raises(CheckpointError, match=expected):
        GenerationDefaults.open(tmp_path)
