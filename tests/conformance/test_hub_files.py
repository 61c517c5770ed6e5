"""Tests of model folders in the forms of the hub: they give transformers' greedy tokens."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conformance.test_greedy_tokens import assert_same, generate, make_prompts, reference
from shoal import LLM, SamplingParams
from shoal.models.registry import FAMILIES, read_spec
from support.hub_files import Spelling, respell, rounded

pytestmark = pytest.mark.slow

Checkpoint = Callable[[str], Path]

HALF, BRAIN, WHOLE = torch.float16, torch.bfloat16, torch.float32

# Every family, and together every form of files: each format, one file and several, each type, names with and
# without the model's prefix, heads stored or left out. Few are pickled: a child process opens such files.
SPELLINGS: dict[str, Spelling] = {
    "deepseek_v2": Spelling("safetensors", BRAIN, shards=4),
    "deepseek_v3": Spelling("safetensors", BRAIN, shards=2),
    "gemma": Spelling("safetensors", BRAIN, shards=2, tied_head=True),
    "gemma2": Spelling("safetensors", BRAIN, shards=3, prefix=""),
    "gemma3": Spelling("legacy", BRAIN, prefix="language_model.model."),
    "gpt2": Spelling("pickled", WHOLE, prefix="", shards=2, extras=True),
    "gpt_neox": Spelling("safetensors", HALF, shards=2, extras=True),
    "granitemoe": Spelling("safetensors", BRAIN, shards=2),
    "llama": Spelling("safetensors", HALF, shards=2, extras=True),
    "llama3": Spelling("safetensors", BRAIN, shards=3),
    "llama_yarn": Spelling("safetensors", HALF, prefix="", shards=2),
    "mistral": Spelling("safetensors", BRAIN, shards=2),
    "mixtral": Spelling("safetensors", BRAIN, shards=3),
    "opt": Spelling("safetensors", HALF, prefix="decoder.", tied_head=True),
    "opt_350m": Spelling("safetensors", HALF, prefix="model.decoder.", tied_head=True),
    "phi": Spelling("safetensors", HALF, extras=True),
    "phi3": Spelling("safetensors", BRAIN, old_config=False, prefix=""),
    "qwen2": Spelling("safetensors", BRAIN, tied_head=True),
    "qwen2_moe": Spelling("safetensors", HALF, shards=2),
    "qwen3": Spelling("safetensors", BRAIN, old_config=False, shards=2, tied_head=True),
    "qwen3_moe": Spelling("safetensors", BRAIN, old_config=False),
}
PROMPTS = make_prompts([1, 9, 40], seed=21)
STEPS = 12


@pytest.fixture(scope="module")
def spelled(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Make folders by name: one in a form of the hub, and one with the same weights that transformers has saved."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(name: str) -> tuple[Path, Path]:
        if name not in made:
            folder, spelling = tmp_path_factory.mktemp(name), SPELLINGS[name]
            hub = respell(checkpoint(name), folder / "hub", spelling)
            made[name] = hub, rounded(checkpoint(name), folder / "saved", spelling.dtype)
        return made[name]

    return get


Spelled = Callable[[str], tuple[Path, Path]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give each folder two ranks; test_matrix.py has each family on one and on three. With --matrix they have all."""
    if "tp" in metafunc.fixturenames:
        metafunc.parametrize("tp", [1, 2, 3] if metafunc.config.getoption("--matrix") else [2])


@pytest.mark.parametrize("name", SPELLINGS)
def test_thread_ranks(spelled: Spelled, name: str, tp: int) -> None:
    hub, saved = spelled(name)
    assert_same(saved, PROMPTS, generate(hub, PROMPTS, STEPS, tensor_parallel_size=tp, dtype="float32"))


def test_every_family_is_spelled(spelled: Spelled) -> None:
    assert {read_spec(spelled(name)[0]).family for name in SPELLINGS} == set(FAMILIES)


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_spec_is_the_same(checkpoint: Checkpoint, spelled: Spelled, name: str) -> None:
    """Old and new keys mean the same; only the type differs."""
    hub, saved = spelled(name)
    ours, theirs = read_spec(hub), read_spec(saved)
    assert ours.dtype == str(SPELLINGS[name].dtype).removeprefix("torch.")
    for field in type(ours).__dataclass_fields__:
        if field not in ("dtype", "attention"):
            assert getattr(ours, field) == getattr(theirs, field), field
    layers = range(ours.num_layers)
    assert [ours.attention_of(i) for i in layers] == [theirs.attention_of(i) for i in layers]


def test_process_ranks(spelled: Spelled) -> None:
    hub, saved = spelled("gpt2")
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    assert_same(saved, PROMPTS, generate(hub, PROMPTS, STEPS, dtype="float32", **options))


def test_unequal_ranks(spelled: Spelled) -> None:
    hub, saved = spelled("gpt_neox")
    options = {"tensor_parallel_size": 3, "tensor_parallel_split": (4, 1, 3)}
    assert_same(saved, PROMPTS, generate(hub, PROMPTS, STEPS, dtype="float32", **options))


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
def test_types_in_memory(spelled: Spelled, dtype: str) -> None:
    """With 8 or 11 bits, log-probabilities change by some hundredths; with a wrong conversion by more than 1."""
    hub, saved = spelled("llama")
    for prompt, output in zip(PROMPTS, generate(hub, PROMPTS, 1, dtype=dtype), strict=True):
        _, rows = reference(saved, tuple(prompt), 1)
        (token,) = output.outputs[0].token_ids
        logprobs = output.outputs[0].logprobs
        assert logprobs is not None
        assert abs(logprobs[0][token].logprob - float(rows[0, token])) < 0.25


def test_several_ends_of_text(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The second end-of-text token of generation_config.json ends an output too."""
    prompt = PROMPTS[2]
    expected, _ = reference(checkpoint("llama"), tuple(prompt), STEPS)
    stop = expected[4]
    hub = respell(checkpoint("llama"), tmp_path / "hub", Spelling("safetensors", WHOLE, eos=(2, stop)))
    with LLM(str(hub), distributed_executor_backend="uni", kv_cache_memory_bytes=2**21) as llm:
        params = SamplingParams(temperature=0, max_tokens=STEPS)
        (output,) = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)[0].outputs
    assert output.finish_reason == "stop"
    assert list(output.token_ids) == expected[: expected.index(stop) + 1]
