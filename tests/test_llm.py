"""`LLM`: what it takes, what it gives, and what it refuses with which error."""

import inspect
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import shoal
from shoal import LLM, EngineError, RequestError, RequestOutput, SamplingParams, ShoalError, UserError
from shoal.errors import CheckpointError, ClosedError, ConfigError, RankFailed
from shoal.frontend import llm as llm_module
from shoal.worker.runner import Runner
from support import checkpoints

Checkpoints = Callable[[str], Path]
SMALL: dict[str, Any] = {"kv_cache_memory_bytes": "2MiB", "max_model_len": 64}
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(checkpoint: Checkpoints) -> Path:
    return checkpoint("llama")


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    """Without a tokenizer."""
    with LLM(str(folder), **SMALL) as found:
        yield found


@pytest.fixture(scope="module")
def bundled() -> Iterator[LLM]:
    with LLM(**SMALL) as found:
        yield found


# --- the package -------------------------------------------------------------------------------------------------


def test_public_names() -> None:
    assert set(shoal.__all__) == {
        "__version__",
        "LLM",
        "SamplingParams",
        "RequestOutput",
        "CompletionOutput",
        "ShoalError",
        "UserError",
        "RequestError",
        "EngineError",
    }
    for name in shoal.__all__:
        assert getattr(shoal, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = shoal.Nothing


def test_public_signatures() -> None:
    assert list(inspect.signature(LLM.__init__).parameters) == ["self", "model", "options"]
    assert list(inspect.signature(LLM.generate).parameters) == ["self", "prompts", "sampling_params", "use_tqdm"]
    assert list(inspect.signature(SamplingParams).parameters) == [
        *("temperature", "top_p", "top_k", "seed", "max_tokens", "ignore_eos", "stop_token_ids", "logprobs")
    ]


def test_tree_of_errors() -> None:
    assert issubclass(UserError, ShoalError)
    assert issubclass(EngineError, ShoalError)
    assert issubclass(RequestError, UserError)
    assert issubclass(RequestError, ValueError)
    assert issubclass(ConfigError, UserError)
    assert issubclass(CheckpointError, UserError)
    assert issubclass(ClosedError, EngineError)
    assert not issubclass(UserError, EngineError)
    assert (UserError.exit_code, EngineError.exit_code) == (2, 1)


@pytest.mark.parametrize("module", ["shoal", "shoal.frontend.llm", "shoal.cli.main"])
def test_imports_load_no_torch(module: str) -> None:
    heavy = "[name for name in ('torch', 'transformers', 'huggingface_hub') if name in sys.modules]"
    code = f"import sys, {module}; shoal.SamplingParams; print({heavy})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.strip() == "[]"


# --- prompts and outputs -----------------------------------------------------------------------------------------


def test_bare_text(bundled: LLM) -> None:
    (output,) = bundled.generate("1 + 1 =", GREEDY, use_tqdm=False)
    assert output.prompt == "1 + 1 ="
    assert output.outputs[0].text
    assert len(output.outputs[0].token_ids) == 4
    assert output.outputs[0].finish_reason == "length"
    assert output.finished
    assert output.error is None


def test_kinds_of_prompts_are_the_same(bundled: LLM) -> None:
    (bare,) = bundled.generate("1 + 1 =", GREEDY, use_tqdm=False)
    tokens = bare.prompt_token_ids
    assert tokens
    (text,) = bundled.generate({"prompt": "1 + 1 ="}, GREEDY, use_tqdm=False)
    (ids,) = bundled.generate({"prompt_token_ids": tokens}, GREEDY, use_tqdm=False)
    mixed = bundled.generate(
        ("1 + 1 =", {"prompt": "1 + 1 ="}, {"prompt_token_ids": list(tokens)}), GREEDY, use_tqdm=False
    )
    assert (text.prompt, ids.prompt) == ("1 + 1 =", None)
    assert {each.prompt_token_ids for each in [text, ids, *mixed]} == {tokens}
    assert {each.outputs[0].token_ids for each in [text, ids, *mixed]} == {bare.outputs[0].token_ids}


def test_no_prompts(llm: LLM) -> None:
    assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_outputs_in_the_order_of_the_prompts(llm: LLM) -> None:
    """The first prompt ends last."""
    lengths = [12, 1, 8, 2, 6, 3]
    prompts: list[Any] = [{"prompt_token_ids": [10 + i, 20, 30]} for i in range(len(lengths))]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
    jobs = [llm.prepare(i, prompt, params[i]) for i, prompt in enumerate(prompts)]
    assert [index for index, _ in llm.run(jobs)] != list(range(len(lengths)))
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.prompt_token_ids[0] for output in outputs] == [10 + i for i in range(len(lengths))]
    assert [len(output.outputs[0].token_ids) for output in outputs] == lengths
    assert [output.request_id for output in outputs] == [str(i) for i in range(len(lengths))]


def test_one_sampling_for_all_or_one_each(llm: LLM) -> None:
    prompts: list[Any] = [{"prompt_token_ids": [5]}, {"prompt_token_ids": [6]}]
    same = llm.generate(prompts, GREEDY, use_tqdm=False)
    each = llm.generate(prompts, [GREEDY, GREEDY], use_tqdm=False)
    assert [o.outputs for o in same] == [o.outputs for o in each]
    default = llm.generate(prompts, use_tqdm=False)
    assert all(1 <= len(o.outputs[0].token_ids) <= 16 for o in default)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_wrong_number_of_samplings(llm: LLM, count: int) -> None:
    prompts: list[Any] = [{"prompt_token_ids": [5]}] * 2
    with pytest.raises(RequestError, match=f"2 prompts and {count} sampling parameters: give one for all or one for"):
        llm.generate(prompts, [GREEDY] * count, use_tqdm=False)


def test_max_tokens_end_with_the_context(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=1000, ignore_eos=True)
    (output,) = llm.generate({"prompt_token_ids": [5] * 60}, params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 4
    assert output.outputs[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ({"prompt_token_ids": []}, "empty"),
        ({"prompt_token_ids": [3] * 64}, r"64 tokens; with --max-model-len 64 it may have 63 at most"),
        ({"prompt_token_ids": [301]}, "301 is no id of a vocabulary of 301"),
        ({"prompt_token_ids": [-1]}, "-1 is no id"),
        ({"prompt_token_ids": [True]}, "True is no id"),
        ({"prompt_token_ids": [1.0]}, "1.0 is no id"),
        ({"prompt_token_ids": "12"}, "list of integers"),
        ({"prompt_token_ids": None}, "list of integers"),
        ({"prompt_token_ids": {1: 2}}, "list of integers"),
        ({"text": "a"}, "got dict"),
        (7, "got int"),
        (None, "got NoneType"),
        ("text", "no tokenizer: give prompt_token_ids"),
    ],
)
def test_bad_prompts(llm: LLM, prompt: Any, says: str) -> None:
    steps = llm.stats().steps
    with pytest.raises(RequestError, match=f"^prompt 1: .*{says}"):
        llm.generate([{"prompt_token_ids": [5]}, prompt], GREEDY, use_tqdm=False)
    assert llm.stats().steps == steps, "nothing is to be run"


def test_bad_texts(bundled: LLM) -> None:
    with pytest.raises(RequestError, match="prompt 0: the prompt is empty"):
        bundled.generate("", GREEDY, use_tqdm=False)
    with pytest.raises(RequestError, match=r"prompt 1: .* it may have 63 at most"):
        bundled.generate(["a", "37 + 45 = " * 100], GREEDY, use_tqdm=False)
    with pytest.raises(RequestError, match=r"prompt 0: the prompt is not valid Unicode: .* at character 2"):
        bundled.generate("a \udc80", GREEDY, use_tqdm=False)


@pytest.mark.parametrize(
    "values",
    [
        *({"temperature": value} for value in (-0.1, float("nan"), float("inf"), "1", None, True)),
        *({"top_p": value} for value in (0, -0.1, 1.1, float("nan"), "1", None)),
        *({"top_k": value} for value in (-2, 1.5, "1", None, True)),
        *({"max_tokens": value} for value in (0, -1, 1.5, "1", True)),
        *({"seed": value} for value in (1.5, "1", True)),
        *({"logprobs": value} for value in (-1, 1.5, True)),
        {"stop_token_ids": ["a"]},
    ],
    ids=str,
)
def test_bad_sampling(values: dict[str, Any]) -> None:
    (name,) = values
    with pytest.raises(RequestError, match=name):
        SamplingParams(**values)


# --- options and models ------------------------------------------------------------------------------------------


@pytest.fixture
def _no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr(llm_module, "build_engine", refuse)


@pytest.mark.usefixtures("_no_engine")
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tensor_parallel": 2}, "unknown option tensor_parallel; did you mean tensor_parallel_size"),
        ({"tensor_parallel_size": "2"}, "--tensor-parallel-size takes an integer, got '2'"),
        ({"tensor_parallel_size": True}, "takes an integer, got True"),
        ({"tensor_parallel_size": None}, "takes an integer, got None"),
        ({"tensor_parallel_size": 0}, "must be at least 1, got 0"),
        ({"tensor_parallel_size": 3, "num_devices": 2}, "--tensor-parallel-size 3 needs 3 devices"),
        ({"tensor_parallel_size": 2, "distributed_executor_backend": "uni"}, "uni runs one rank, not 2"),
        ({"dtype": "int8"}, "--dtype must be one of auto, float32"),
        ({"max_model_len": 257}, "--max-model-len 257 is more than the model's 256 positions"),
        ({"device_memory": "1 parsec"}, "--device-memory takes a number of bytes such as 512MiB"),
        ({"device_memory": "1MiB"}, "--device-memory 1.00 MiB is .* too small for rank 0"),
        ({"kv_cache_memory_bytes": 20_000, "max_model_len": 100}, "room for 16 tokens .* 84 fewer"),
        ({"gpu_memory_utilization": 1.5}, r"must be in \(0, 1\]"),
    ],
)
def test_bad_options(folder: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        LLM(str(folder), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("_no_engine")
def test_no_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    with pytest.raises(ConfigError, match=r"--device cuda: .* use --device cpu"):
        LLM(str(folder), device="cuda")


@pytest.mark.usefixtures("_no_engine")
def test_bad_models(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        LLM(str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        LLM(str(tmp_path))
    with pytest.raises(CheckpointError, match="there is no shape 'x'; known are"):
        LLM("shape:x")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match="has no weights"):
        LLM(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"is truncated: .* download it again"):
        LLM(str(tmp_path))


@pytest.mark.usefixtures("_no_engine")
def test_missing_shard(tmp_path: Path) -> None:
    folder = checkpoints.save("llama", tmp_path / "model", max_shard_size="200KB")
    lost = sorted(folder.glob("*.safetensors"))[-1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=f"lacks 1 of .*{lost.name}"):
        LLM(str(folder))


@pytest.mark.usefixtures("_no_engine")
def test_broken_tokenizer(folder: Path, tmp_path: Path) -> None:
    spoiled = Path(shutil.copytree(folder, tmp_path / "model"))
    (spoiled / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json can't be read"):
        LLM(str(spoiled), **SMALL)


def test_shape_needs_no_weights() -> None:
    with LLM("shape:llama-10m", kv_cache_memory_bytes="8MiB", max_model_len=32) as dummy:
        assert dummy.options.model_options.load_format == "dummy"
        (output,) = dummy.generate({"prompt_token_ids": [1, 2, 3]}, GREEDY, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 4


def test_eos_of_the_generation_config(folder: Path, tmp_path: Path) -> None:
    prompt: Any = {"prompt_token_ids": [7, 8]}
    with LLM(str(folder), **SMALL) as plain:
        (free,) = plain.generate(prompt, GREEDY, use_tqdm=False)
    tokens = free.outputs[0].token_ids
    other = Path(shutil.copytree(folder, tmp_path / "model"))
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [299, tokens[2]]}))
    with LLM(str(other), **SMALL) as stopping:
        (output,) = stopping.generate(prompt, SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
    first = tokens.index(tokens[2])
    assert output.outputs[0].token_ids == tokens[: first + 1]
    assert output.outputs[0].finish_reason == "stop"


# --- ends --------------------------------------------------------------------------------------------------------


def test_closed(folder: Path) -> None:
    llm = LLM(str(folder), **SMALL)
    llm.close()
    llm.close()
    with pytest.raises(ClosedError, match="was closed"):
        llm.generate({"prompt_token_ids": [5]}, GREEDY, use_tqdm=False)
    with pytest.raises(ClosedError, match="was closed"):
        llm.stats()


def test_with_closes_after_an_error(folder: Path) -> None:
    with pytest.raises(KeyError), LLM(str(folder), **SMALL) as llm:
        raise KeyError
    with pytest.raises(ClosedError):
        llm.stats()


def test_run_that_is_given_up_leaves_the_engine_usable(llm: LLM) -> None:
    long = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
    (expected,) = llm.generate({"prompt_token_ids": [9, 8]}, GREEDY, use_tqdm=False)
    jobs = [llm.prepare(i, {"prompt_token_ids": [20 + i]}, long if i else GREEDY) for i in range(5)]
    run = llm.run(jobs)
    next(run)
    assert llm.stats().running == 4
    run.close()  # type: ignore[attr-defined]
    stats = llm.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    assert stats.free_blocks == stats.num_blocks
    (again,) = llm.generate({"prompt_token_ids": [9, 8]}, GREEDY, use_tqdm=False)
    assert again.outputs == expected.outputs


def test_jobs_that_raise_leave_the_engine_usable(llm: LLM) -> None:
    def jobs() -> Iterator[Any]:
        yield llm.prepare(0, {"prompt_token_ids": [5]}, GREEDY)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        list(llm.run(jobs()))
    assert llm.stats().running == llm.stats().waiting == 0
    assert len(llm.generate({"prompt_token_ids": [5]}, GREEDY, use_tqdm=False)) == 1


def test_interrupt_in_the_middle_of_a_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank in this process: nobody knows what half a step has done, so the engine says that it has ended."""
    execute, calls = Runner.execute, 0

    def interrupted(self: Runner, plan: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return execute(self, plan)

    with LLM(str(folder), **SMALL) as llm:
        monkeypatch.setattr(Runner, "execute", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate({"prompt_token_ids": [5]}, GREEDY, use_tqdm=False)
        begun = time.monotonic()
        with pytest.raises(RankFailed, match="interrupted in the middle"):
            llm.generate({"prompt_token_ids": [5]}, GREEDY, use_tqdm=False)
        with pytest.raises(ClosedError, match="interrupted in the middle"):
            llm.generate({"prompt_token_ids": [5]}, GREEDY, use_tqdm=False)
        assert time.monotonic() - begun < 5


def test_runs_that_take_turns_lose_nothing(llm: LLM) -> None:
    """Whoever asks the engine first gets the other's updates too."""
    jobs = [[llm.prepare(i, {"prompt_token_ids": [5 + i + 10 * run]}, GREEDY) for i in range(4)] for run in range(2)]
    alone = [dict(llm.run(some)) for some in jobs]
    first, second = llm.run(jobs[0]), llm.run(jobs[1])
    together: list[dict[int, RequestOutput]] = [{}, {}]
    for (i, a), (j, b) in zip(first, second, strict=True):
        together[0][i], together[1][j] = a, b
    assert [{i: o.outputs for i, o in run.items()} for run in together] == [
        {i: o.outputs for i, o in run.items()} for run in alone
    ]


def test_as_many_tokens_as_fit(llm: LLM) -> None:
    (output,) = llm.generate(
        {"prompt_token_ids": [5]}, SamplingParams(max_tokens=None, ignore_eos=True), use_tqdm=False
    )
    assert len(output.outputs[0].token_ids) == llm.stats().max_model_len - 1


def test_a_seed_of_minus_one_is_none() -> None:
    assert SamplingParams(seed=-1).seed is None


def test_a_path_is_a_model(folder: Path) -> None:
    with LLM(folder, **SMALL) as llm:
        assert llm.options.model == str(folder)
