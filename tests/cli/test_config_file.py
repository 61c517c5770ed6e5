"""Flags from a YAML file, from the environment and from the command line, and which ones override others."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoal.cli import generate as generate_module
from shoal.cli.generate import generate
from shoal.cli.sampling import sampling_values
from shoal.config.engine_options import options
from shoal.llm import llm as llm_module
from shoal.params import SamplingParams

Shoal = Callable[..., int]


class Reached(Exception):
    """The command has read all flags."""


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SHOAL_", "VLLM_")):
            monkeypatch.delenv(name)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[Any, dict[str, Any], dict[str, Any]]]:
    """Return a function that returns (model, engine options, sampling) for a config file and flags."""

    def run(content: str, *flags: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        (tmp_path / "c.yaml").write_text(content)
        found: list[Any] = []

        def sampling(flags: dict[str, Any]) -> dict[str, Any]:
            found.append(sampling_values(flags))
            return found[-1]  # type: ignore[no-any-return]

        def open_model(model: Any, engine: dict[str, Any], **_: Any) -> None:
            found.extend([model, engine])
            raise Reached

        with monkeypatch.context() as patch:
            patch.setattr(generate_module, "sampling_values", sampling)
            patch.setattr(generate_module, "open_model", open_model)
            with pytest.raises(Reached):
                generate.main(["--config", str(tmp_path / "c.yaml"), "-p", "x", *flags], standalone_mode=False)
        return found[1], found[2], found[0]

    return run


def test_all_flags_may_be_in_the_file(seen: Any) -> None:
    content = """
    model: some/model
    tensor-parallel-size: 2
    max_num_seqs: 5
    kv_cache_memory_bytes: 2GiB
    device-memory: 1000
    dtype: bfloat16
    enable-prefix-caching: false
    no-enforce-eager: true
    start-timeout: 5
    tensor_parallel_split: [2, 1]
    speculative-config: {method: ngram, num_speculative_tokens: 3}
    max-tokens: 7
    temperature: 1
    stop: ["a", "b"]
    bad-words: one
    logit_bias: {5: -1.5}
    stop-token-ids: [1, 2]
    sample-seed: 3
    """
    model, engine, sampling = seen(content)
    assert model == "some/model"
    expected = {
        "tensor_parallel_size": 2, "max_num_seqs": 5, "kv_cache_memory_bytes": 2**31, "device_memory": 1000,
        "dtype": "bfloat16", "enable_prefix_caching": False, "enforce_eager": False, "start_timeout": 5.0,
        "tensor_parallel_split": (2, 1),
    }  # fmt: skip
    assert {name: engine[name] for name in expected} == expected
    assert engine["speculative_config"].num_speculative_tokens == 3
    assert SamplingParams.from_dict(sampling) == SamplingParams(
        max_tokens=7, temperature=1, stop=["a", "b"], bad_words=["one"], logit_bias={5: -1.5}, stop_token_ids=[1, 2],
        seed=3,
    )  # fmt: skip


def test_empty_files_change_nothing(seen: Any) -> None:
    for content in ("", "# nothing\n", "{}", "max-model-len: null\n"):
        assert seen(content) == (None, {}, {})


def test_numbers_in_json_notation(seen: Any) -> None:
    for text, number in [("1e-3", 0.001), ("1E0", 1.0), (".5e+0", 0.5), ("2.e-1", 0.2), ("0.25", 0.25)]:
        assert seen(f"temperature: {text}")[2] == {"temperature": number}
    assert seen("stop: [1e, e5, 0x1e-3, '1e-3']")[2] == {"stop": ("1e", "e5", "0x1e-3", "1e-3")}


def test_keys_may_have_their_dashes_and_share_values(seen: Any) -> None:
    assert seen("-tp: 2\n--seed: 1")[1] == {"tensor_parallel_size": 2, "seed": 1}
    merged = "speculative-config: {<<: {method: draft, num_speculative_tokens: 2}, method: ngram}"
    assert seen(merged)[1]["speculative_config"].num_speculative_tokens == 2


def test_flags_override_variables_and_these_override_the_file(seen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    content = "block-size: 1\nseed: 1\nmax-num-seqs: 1\nmax-tokens: 1\n"
    monkeypatch.setenv("SHOAL_BLOCK_SIZE", "2")
    monkeypatch.setenv("SHOAL_SEED", "2")
    _, engine, sampling = seen(content, "--block-size", "3", "--max-tokens", "3")
    assert (engine["block_size"], engine["seed"], engine["max_num_seqs"]) == (3, 2, 1)
    assert sampling == {"max_tokens": 3}


def test_variables_of_every_kind(seen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {
        "tensor_parallel_size": ("2", 2), "start_timeout": ("5", 5.0), "dtype": ("float16", "float16"),
        "engine_process": ("yes", True), "enable_prefix_caching": ("0", False), "device_memory": ("1GiB", 2**30),
        "tensor_parallel_split": ("2,1", (2, 1)), "revision": (" main ", "main"), "max_model_len": ("", None),
    }  # fmt: skip
    for name, (text, _) in texts.items():
        monkeypatch.setenv(f"SHOAL_{name.upper()}", text)
    _, engine, _ = seen("")
    assert engine == {name: value for name, (_, value) in texts.items() if value is not None}


def test_our_variables_override_those_of_vllm(seen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "60")
    monkeypatch.setenv("VLLM_ENGINE_READY_TIMEOUT_S", "70")
    monkeypatch.setenv("SHOAL_START_TIMEOUT", "80")
    _, engine, _ = seen("")
    assert engine == {"step_timeout": 60.0, "start_timeout": 80.0}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("tensor-paralel-size: 2", "unknown key tensor-paralel-size; did you mean tensor-parallel-size?"),
        ("max_token: 2", "unknown key max_token; did you mean max-tokens?"),
        ("xyzzy: 2", "unknown key xyzzy; docs/flags.md lists"),
        ("rope_theta: 2", "unknown key rope_theta; Shoal does not have vLLM's --rope-theta: use --hf-overrides"),
        ("reasoning-parser: x", "unknown key reasoning-parser; Shoal does not have vLLM's --reasoning-parser yet"),
        ("config: x", "unknown key config"),
        ("block-size: '8'", "block-size takes an integer, got '8'"),
        ("block-size: 8.5", "block-size takes an integer, got 8.5"),
        ("block-size: true", "block-size takes an integer, got True"),
        ("block-size: null", "block-size takes an integer, got None"),
        ("block-size: 0", "block-size must be at least 1, got 0"),
        ("enforce-eager: 1", "enforce-eager takes true or false, got 1"),
        ("no-enforce-eager: 1", "no-enforce-eager takes true or false, got 1"),
        ("dtype: int8", "dtype must be one of auto, float32"),
        ("max-tokens: many", "max-tokens takes an integer, got 'many'"),
        ("max-tokens: 1.5", "max-tokens takes an integer, got 1.5"),
        ("max-tokens: [1]", "max-tokens takes an integer, got [1]"),
        ("temperature: true", "temperature takes a number, got True"),
        ("stop: 5", "stop takes a text, got 5"),
        ("stop: [a, 5]", "stop takes a text, got 5"),
        ("chat: 1", "chat takes true or false, got 1"),
        ("output: 1", "output takes a text, got 1"),
        ("model: 1", "model takes a text, got 1"),
        ("logit-bias: '{'", "logit-bias: '{' is not JSON"),
        ("stop-token-ids: a,b", "'a,b' is not a list of token ids"),
        ("top-p: 1\ntop_p: 0.5", "top_p is given twice"),
        ("seed: 1\nseed: 2", ", line 2: seed is given twice"),
        ("speculative-config: {method: ngram, method: draft}", ", line 1: method is given twice"),
        ("-x: 1", "unknown key -x"),
        ("- a", "must map flags to values"),
        ("a: [", "is not YAML"),
        ("{" * 3000, "is not YAML"),
        ("!!python/object/apply:os.system [ls]", "is not YAML"),
    ],
)
def test_mistakes_in_the_file(
    shoal: Shoal, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, says: str
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(content)
    assert shoal("generate", "--config", path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --config {path}")
    assert says in line


def test_files_that_can_not_be_read(shoal: Shoal, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "latin").write_bytes(b"a: caf\xe9")
    for path, says in [("no", "No such file"), (".", "directory"), ("latin", "is not YAML")]:
        assert shoal("generate", "--config", tmp_path / path) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("SHOAL_BLOCK_SIZE", "x", "SHOAL_BLOCK_SIZE takes an integer, got 'x'"),
        ("SHOAL_BLOCK_SIZE", "0", "SHOAL_BLOCK_SIZE must be at least 1, got 0"),
        ("SHOAL_ENGINE_PROCESS", "maybe", "SHOAL_ENGINE_PROCESS takes true or false, got 'maybe'"),
        ("VLLM_ENGINE_READY_TIMEOUT_S", "x", "VLLM_ENGINE_READY_TIMEOUT_S takes a number, got 'x'"),
        ("SHOAL_DEVICE_MEMORY", "lots", "SHOAL_DEVICE_MEMORY takes a number of bytes"),
        ("SHOAL_SPECULATIVE_CONFIG", "{", "SHOAL_SPECULATIVE_CONFIG is not JSON"),
        ("SHOAL_LOG_LEVEL", "loud", "SHOAL_LOG_LEVEL must be one of debug, info, warning, error, critical, got 'loud'"),
    ],
)
def test_mistakes_in_the_environment(
    shoal: Shoal,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    value: str,
    says: str,
) -> None:
    monkeypatch.setenv(name, value)
    assert shoal("generate") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert says in line


def test_unknown_variables_are_reported(
    shoal: Shoal, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SHOAL_TENSOR_PARALEL_SIZE", "2")
    monkeypatch.setenv("SHOAL_XYZZY", "2")
    monkeypatch.setenv("SHOAL_BLOCK_SIZE", "16")
    assert shoal("completion", "bash") == 0
    first, second = capsys.readouterr().err.splitlines()
    assert "SHOAL_TENSOR_PARALEL_SIZE is not read; did you mean SHOAL_TENSOR_PARALLEL_SIZE?" in first
    assert "SHOAL_XYZZY is not read; docs/flags.md" in second


def test_every_engine_option_can_be_written_to_a_file(seen: Any) -> None:
    defaults = {
        option.name: option.default
        for option in options()
        if option.default is not None and option.name != "speculative_config" and not option.online
    }
    _, engine, _ = seen(json.dumps(defaults))  # JSON is YAML, too
    assert engine == defaults


def test_the_library_takes_variables_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def open_model(model: Any, options: dict[str, Any], **_: Any) -> None:
        found.update(options)
        raise Reached

    found: dict[str, Any] = {}
    monkeypatch.setattr(llm_module, "open_model", open_model)
    monkeypatch.setenv("SHOAL_BLOCK_SIZE", "2")
    monkeypatch.setenv("SHOAL_SEED", "2")
    with pytest.raises(Reached):
        llm_module.LLM(seed=3)
    assert found == {"block_size": 2, "seed": 3}
