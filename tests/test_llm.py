"""`LLM`: its arguments, its outputs, and its errors."""

import dataclasses
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
from shoal import (
    LLM,
    BeamSearchParams,
    CompletionOutput,
    EngineError,
    RequestError,
    RequestOutput,
    SamplingParams,
    ShoalError,
    StructuredOutputsParams,
    UserError,
)
from shoal.errors import CheckpointError, ClosedError, ConfigError, RankFailed, ReplicasFailed
from shoal.launch import hub
from shoal.launch.open_model import open_model
from shoal.llm import llm as llm_module
from shoal.params import Prompt
from shoal.text.tokenizer import open_tokenizer
from shoal.worker.runner import Runner
from support import checkpoints, tokenizers

DEMO_MODEL = Path(shoal.__file__).parent / "demo_model"
Checkpoints = Callable[[str], Path]
SMALL: dict[str, Any] = {"kv_cache_memory_bytes": "2MiB", "max_model_len": 64}
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(checkpoint: Checkpoints) -> Path:
    return checkpoint("llama")


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    """A model without a tokenizer."""
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
        "AsyncLLM",
        "DataParallelRank",
        "SamplingParams",
        "RequestOutput",
        "CompletionOutput",
        "Logprob",
        "StructuredOutputsParams",
        "BeamSearchParams",
        "BeamSearchOutput",
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
    assert list(inspect.signature(LLM.chat).parameters) == [
        *("self", "messages", "sampling_params", "use_tqdm", "chat_template", "add_generation_prompt"),
        *("continue_final_message", "tools", "chat_template_kwargs"),
    ]
    assert list(inspect.signature(LLM.beam_search).parameters) == ["self", "prompts", "params"]
    assert list(inspect.signature(BeamSearchParams).parameters) == [
        *("beam_width", "max_tokens", "ignore_eos", "temperature", "length_penalty"),
    ]
    assert list(inspect.signature(SamplingParams).parameters) == [
        *("n", "temperature", "top_p", "top_k", "min_p"),
        *("presence_penalty", "frequency_penalty", "repetition_penalty"),
        *("seed", "max_tokens", "min_tokens", "ignore_eos", "stop", "stop_token_ids", "bad_words"),
        *("logprobs", "prompt_logprobs", "logit_bias", "allowed_token_ids", "structured_outputs"),
        *("detokenize", "skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output"),
        *("truncate_prompt_tokens", "extra_args", "logits_processors", "thinking_token_budget"),
    ]


def test_the_error_classes() -> None:
    assert issubclass(UserError, ShoalError)
    assert issubclass(EngineError, ShoalError)
    assert issubclass(RequestError, UserError)
    assert issubclass(RequestError, ValueError)
    assert issubclass(ConfigError, UserError)
    assert issubclass(CheckpointError, UserError)
    assert issubclass(ClosedError, EngineError)
    assert issubclass(ReplicasFailed, EngineError)
    assert not issubclass(UserError, EngineError)
    assert (UserError.exit_code, EngineError.exit_code) == (2, 1)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["shoal.llm.llm", "shoal.cli.commands"])
def test_imports_load_no_torch(module: str) -> None:
    heavy = "[name for name in ('torch', 'transformers', 'huggingface_hub') if name in sys.modules]"
    every_command = "shoal.cli.commands.every_command()" if module == "shoal.cli.commands" else "shoal.SamplingParams"
    code = f"import sys, {module}; {every_command}; print({heavy})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.strip() == "[]"


# --- prompts and outputs -----------------------------------------------------------------------------------------


def test_a_prompt_may_be_a_text(bundled: LLM) -> None:
    (output,) = bundled.generate("1 + 1 =", GREEDY, use_tqdm=False)
    assert output.prompt == "1 + 1 ="
    assert output.outputs[0].text
    assert len(output.outputs[0].token_ids) == 4
    assert output.outputs[0].finish_reason == "length"
    assert output.finished
    assert output.error is None


def test_all_kinds_of_prompts_give_the_same_output(bundled: LLM) -> None:
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


def test_only_prompts_with_the_same_salt_share_cached_prefixes(bundled: LLM) -> None:
    text = "An evening with many words, so that the prompt fills blocks. " * 2

    def cached(salt: str | None) -> int:
        prompt: Prompt = text if salt is None else {"prompt": text, "cache_salt": salt}
        return bundled.generate([prompt], GREEDY, use_tqdm=False)[0].num_cached_tokens

    assert [cached(salt) > 0 for salt in ("a", "a", "b", "b", None, None)] == [False, True] * 3


def test_a_prompt_is_cut_to_its_last_tokens(llm: LLM) -> None:
    params = dataclasses.replace(GREEDY, truncate_prompt_tokens=3)
    cut, short = llm.generate([{"prompt_token_ids": [9, 8, 7, 6, 5]}, {"prompt_token_ids": [7, 6, 5]}], params)
    assert cut.prompt_token_ids == (7, 6, 5)
    assert cut.outputs[0].token_ids == short.outputs[0].token_ids


def test_without_prompts_there_are_no_outputs(llm: LLM) -> None:
    assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_outputs_are_in_the_order_of_the_prompts(llm: LLM) -> None:
    """The output of the first prompt is the last to finish."""
    lengths = [12, 1, 8, 2, 6, 3]
    prompts: list[Any] = [{"prompt_token_ids": [10 + i, 20, 30]} for i in range(len(lengths))]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
    jobs = [llm.prepare(i, prompt, params[i]) for i, prompt in enumerate(prompts)]
    assert [index for index, _ in llm.run(jobs)] != list(range(len(lengths)))
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.prompt_token_ids[0] for output in outputs] == [10 + i for i in range(len(lengths))]
    assert [len(output.outputs[0].token_ids) for output in outputs] == lengths
    assert [output.request_id for output in outputs] == [str(i) for i in range(len(lengths))]


def test_parameters_may_be_given_once_or_for_each_prompt(llm: LLM) -> None:
    prompts: list[Any] = [{"prompt_token_ids": [5]}, {"prompt_token_ids": [6]}]
    same = llm.generate(prompts, GREEDY, use_tqdm=False)
    each = llm.generate(prompts, [GREEDY, GREEDY], use_tqdm=False)
    assert [o.outputs for o in same] == [o.outputs for o in each]
    default = llm.generate(prompts, use_tqdm=False)
    assert all(1 <= len(o.outputs[0].token_ids) <= 16 for o in default)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_wrong_number_of_parameters_is_refused(llm: LLM, count: int) -> None:
    prompts: list[Any] = [{"prompt_token_ids": [5]}] * 2
    with pytest.raises(RequestError, match=f"there are 2 prompts, but {count} sampling_params: give one for all"):
        llm.generate(prompts, [GREEDY] * count, use_tqdm=False)


def test_max_tokens_is_cut_to_the_context_length(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=1000, ignore_eos=True)
    (output,) = llm.generate({"prompt_token_ids": [5] * 60}, params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 4
    assert output.outputs[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ({"prompt_token_ids": []}, "empty"),
        (
            {"prompt_token_ids": [3] * 64},
            r"length is 64 tokens; the prompt has 64 tokens, but the output needs at least one",
        ),
        ({"prompt_token_ids": [301]}, "301 is not a token id: the vocabulary has 301 tokens"),
        ({"prompt_token_ids": [-1]}, "-1 is not a token id"),
        ({"prompt_token_ids": [True]}, "True is not a token id"),
        ({"prompt_token_ids": [1.0]}, "1.0 is not a token id"),
        ({"prompt_token_ids": "12"}, "list of integers"),
        ({"prompt_token_ids": None}, "list of integers"),
        ({"prompt_token_ids": {1: 2}}, "list of integers"),
        ({"text": "a"}, "got dict"),
        (7, "got int"),
        (None, "got NoneType"),
        ("text", "no tokenizer: give prompt_token_ids"),
    ],
)
def test_invalid_prompts_are_refused_and_named(llm: LLM, prompt: Any, says: str) -> None:
    steps = llm.stats().steps
    with pytest.raises(RequestError, match=f"^prompt 1: .*{says}"):
        llm.generate([{"prompt_token_ids": [5]}, prompt], GREEDY, use_tqdm=False)
    assert llm.stats().steps == steps, "no step is run"


def test_invalid_texts_are_refused_and_named(bundled: LLM) -> None:
    with pytest.raises(RequestError, match="prompt 0: the prompt is empty"):
        bundled.generate("", GREEDY, use_tqdm=False)
    with pytest.raises(RequestError, match=r"prompt 1: .* length is 64 tokens; .* shorten it or raise --max-model-len"):
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
        *({"logprobs": value} for value in (-2, 1.5, True)),
        {"stop_token_ids": ["a"]},
    ],
    ids=str,
)
def test_invalid_parameters_are_refused(values: dict[str, Any]) -> None:
    (name,) = values
    with pytest.raises(RequestError, match=name):
        SamplingParams(**values)


NOT_PARAMETERS: list[Any] = [{"temperature": 0}, [{"temperature": 0}], [None], 7, "greedy"]


@pytest.mark.parametrize("given", NOT_PARAMETERS, ids=str)
def test_values_that_are_not_parameters_are_refused(llm: LLM, given: Any) -> None:
    with pytest.raises(RequestError, match="sampling_params must be SamplingParams or a list of them, got "):
        llm.generate({"prompt_token_ids": [5]}, given, use_tqdm=False)


@pytest.mark.parametrize("given", [None, 7, b"text"])
def test_values_that_are_not_prompts_are_refused(llm: LLM, given: Any) -> None:
    with pytest.raises(RequestError, match="prompts must be a prompt or a list of them, got "):
        llm.generate(given, GREEDY, use_tqdm=False)


def test_an_error_in_a_parameter_names_its_prompt(llm: LLM) -> None:
    steps = llm.stats().steps
    prompts: list[Any] = [{"prompt_token_ids": [5]}] * 2
    params = [GREEDY, SamplingParams(logit_bias={301: 1.0})]
    with pytest.raises(RequestError, match=r"^prompt 1: logit_bias must hold ids .* in \[0, 301\), got 301"):
        llm.generate(prompts, params, use_tqdm=False)
    assert llm.stats().steps == steps


# --- the ends of outputs -----------------------------------------------------------------------------------------

SUM = "37 + 45 ="
LONG = SamplingParams(temperature=0, max_tokens=12)


def ask(llm: LLM, prompt: Any = SUM, **changes: Any) -> CompletionOutput:
    (output,) = llm.generate(prompt, dataclasses.replace(LONG, **changes), use_tqdm=False)
    assert output.error is None
    return output.outputs[0]


@pytest.mark.slow
def test_an_end_of_text_token_is_left_out_of_the_text(bundled: LLM) -> None:
    plain = ask(bundled)
    assert (plain.finish_reason, plain.stop_reason) == ("stop", None)
    eos = plain.token_ids[-1]
    assert eos in (1, 5)
    shown = ask(bundled, skip_special_tokens=False, include_stop_str_in_output=True)
    assert shown.token_ids == plain.token_ids
    assert shown.text.startswith(plain.text)
    assert len(shown.text) > len(plain.text)
    assert ask(bundled, skip_special_tokens=False).text == plain.text
    beyond = ask(bundled, ignore_eos=True)
    assert (len(beyond.token_ids), beyond.finish_reason) == (12, "length")
    assert beyond.token_ids[: len(plain.token_ids)] == plain.token_ids


@pytest.mark.slow
def test_a_stop_text_ends_the_output(bundled: LLM) -> None:
    whole = ask(bundled, "Count from 3 to 9:", ignore_eos=True)
    stop = whole.text[4:6]
    assert stop not in whole.text[:4]
    cut = ask(bundled, "Count from 3 to 9:", ignore_eos=True, stop=[stop, "never said"])
    assert (cut.text, cut.finish_reason, cut.stop_reason) == (whole.text[:4], "stop", stop)
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    assert len(cut.token_ids) < len(whole.token_ids)
    kept = ask(bundled, "Count from 3 to 9:", ignore_eos=True, stop=stop, include_stop_str_in_output=True)
    assert kept.text == whole.text[:6]
    assert kept.token_ids == cut.token_ids
    stats = bundled.stats()
    assert (stats.running, stats.waiting) == (0, 0)


def test_a_stop_token_ends_the_output(bundled: LLM) -> None:
    whole = ask(bundled)
    third = whole.token_ids[1]
    cut = ask(bundled, stop_token_ids=[third])
    assert cut.token_ids == whole.token_ids[: whole.token_ids.index(third) + 1]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", third)
    assert whole.text.startswith(cut.text)


def test_without_detokenizing_outputs_have_tokens_only(bundled: LLM) -> None:
    plain, tokens = ask(bundled), ask(bundled, detokenize=False)
    assert (tokens.text, tokens.token_ids) == ("", plain.token_ids)


@pytest.mark.slow
def test_each_prompt_may_have_its_own_parameters(bundled: LLM) -> None:
    each = [
        dataclasses.replace(LONG, max_tokens=2, ignore_eos=True),
        dataclasses.replace(LONG, detokenize=False),
        SamplingParams(n=3, temperature=5.0, seed=5, max_tokens=3, ignore_eos=True),
        dataclasses.replace(LONG, logprobs=2, prompt_logprobs=0),
    ]
    together = bundled.generate([SUM] * 4, each, use_tqdm=False)
    for params, output in zip(each, together, strict=True):
        (alone,) = bundled.generate(SUM, params, use_tqdm=False)
        assert [o.token_ids for o in output.outputs] == [o.token_ids for o in alone.outputs]
        assert [o.cumulative_logprob for o in output.outputs] == [o.cumulative_logprob for o in alone.outputs]
        assert [o.text for o in output.outputs] == [o.text for o in alone.outputs]
    assert len({o.token_ids for o in together[2].outputs}) > 1
    assert together[0].outputs[0].logprobs is None
    assert together[3].outputs[0].logprobs is not None
    assert together[3].prompt_logprobs is not None
    assert [None if found is None else len(found) for found in together[3].prompt_logprobs][:2] == [None, 1]


@pytest.mark.slow
def test_parameters_that_contradict_a_grammar_end_only_their_request(bundled: LLM) -> None:
    red = StructuredOutputsParams(choice=["red"])
    impossible = [
        SamplingParams(temperature=0, structured_outputs=red, bad_words=["red"]),
        SamplingParams(temperature=0, structured_outputs=red, allowed_token_ids=[7]),
    ]
    fine = SamplingParams(temperature=0, structured_outputs=red)
    outputs = bundled.generate([SUM] * 3, [*impossible, fine], use_tqdm=False)
    for output in outputs[:2]:
        assert output.error == (
            "structured_outputs can't be obeyed: the request's other parameters forbid every token that may follow"
        )
        assert output.outputs[0].finish_reason == "abort"
    assert (outputs[2].error, outputs[2].outputs[0].text) == (None, "red")


# --- chat, beam search, embeddings -------------------------------------------------------------------------------

TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}{% if add_generation_prompt %}={% endif %}"
MESSAGES = [{"role": "user", "content": "37 + 45"}]


@pytest.mark.slow
def test_chat_through_a_template(bundled: LLM) -> None:
    (output,) = bundled.chat(MESSAGES, LONG, use_tqdm=False, chat_template=TEMPLATE)
    assert output.prompt == "37 + 45 ="
    tokenizer = open_tokenizer(DEMO_MODEL)
    assert tokenizer is not None
    tokens = tokenizer.encode("37 + 45 =", add_special_tokens=False)
    assert output.prompt_token_ids == tuple(tokens), "only the template adds special tokens"
    (same,) = bundled.generate({"prompt_token_ids": tokens}, LONG, use_tqdm=False)
    assert output.outputs == same.outputs


@pytest.mark.slow
def test_several_conversations_at_once(bundled: LLM) -> None:
    many = [MESSAGES, [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "="}]]
    params = [LONG, dataclasses.replace(LONG, max_tokens=1)]
    outputs = bundled.chat(many, params, use_tqdm=False, chat_template=TEMPLATE, add_generation_prompt=False)
    assert [output.prompt for output in outputs] == ["37 + 45 ", "1 + 1 = "]
    assert len(outputs[1].outputs[0].token_ids) == 1
    assert bundled.chat([], LONG, use_tqdm=False) == []


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ("hello", "messages must be a list of messages, or a list of such lists, got 'hello'"),
        (None, "messages must be a list of messages"),
        ([[]], "prompt 0: messages is empty"),
        ([MESSAGES, [{"content": "x"}]], "1: message 0: role must be a string"),
        ([7], "0: messages must be a list of objects"),
    ],
)
def test_invalid_messages_are_refused(bundled: LLM, messages: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        bundled.chat(messages, LONG, use_tqdm=False, chat_template=TEMPLATE)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (3, "chat_template_kwargs must be an object of names and values, got 3"),
        ({"messages": 3}, "chat_template_kwargs can't set messages"),
        ({"tools": 3}, "chat_template_kwargs can't set tools"),
    ],
)
def test_invalid_values_for_a_template_are_refused(bundled: LLM, values: Any, says: str) -> None:
    with pytest.raises(RequestError, match=f"prompt 0: {says}"):
        bundled.chat(MESSAGES, LONG, use_tqdm=False, chat_template=TEMPLATE, chat_template_kwargs=values)


def test_values_for_a_template_may_have_any_other_name(bundled: LLM) -> None:
    once = dataclasses.replace(LONG, max_tokens=1)
    values = {"index": 3, "prepare": 4, "params": 5}
    template = "{{ index }}{{ prepare }}{{ params }}"
    (output,) = bundled.chat(MESSAGES, once, use_tqdm=False, chat_template=template, chat_template_kwargs=values)
    assert output.prompt == "345"


def test_chat_needs_a_template(llm: LLM) -> None:
    with pytest.raises(RequestError, match="this model has no chat template: give chat_template, or plain prompts"):
        llm.chat(MESSAGES, LONG, use_tqdm=False)


@pytest.mark.slow
def test_one_beam_is_greedy(bundled: LLM) -> None:
    prompts = [SUM, "Count from 3 to 9:"]
    greedy = bundled.generate(prompts, dataclasses.replace(LONG, ignore_eos=True), use_tqdm=False)
    beams = bundled.beam_search(prompts, BeamSearchParams(beam_width=1, max_tokens=12, ignore_eos=True))
    for output, found in zip(greedy, beams, strict=True):
        (best,) = found.sequences
        assert best.tokens == output.prompt_token_ids + output.outputs[0].token_ids
        assert best.text == output.outputs[0].text
        assert best.finish_reason == "length"


def test_a_beam_ends_where_the_text_does(bundled: LLM) -> None:
    (output,) = bundled.generate(SUM, LONG, use_tqdm=False)
    (found,) = bundled.beam_search(SUM, BeamSearchParams(beam_width=3, max_tokens=12))
    best = found.sequences[0]
    assert (best.finish_reason, best.text) == ("stop", output.outputs[0].text)
    assert best.tokens == output.prompt_token_ids + output.outputs[0].token_ids
    scores = [each.cum_logprob / (len(each.tokens) - (each.finish_reason == "stop")) for each in found.sequences]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)


def test_beams_are_the_likeliest_of_all_continuations(bundled: LLM) -> None:
    """Outputs have two tokens, and the beam is wide enough that none of the best is lost."""
    everything = SamplingParams(temperature=0, max_tokens=1, logprobs=-1, ignore_eos=True)

    def following(tokens: list[tuple[int, ...]]) -> list[dict[int, float]]:
        outputs = bundled.generate([{"prompt_token_ids": each} for each in tokens], everything, use_tqdm=False)
        found = [output.outputs[0].logprobs for output in outputs]
        assert all(logprobs is not None and len(logprobs[0]) == bundled.vocab_size for logprobs in found)
        return [{token: each.logprob for token, each in logprobs[0].items()} for logprobs in found if logprobs]

    (prompt,) = (output.prompt_token_ids for output in bundled.generate(SUM, GREEDY, use_tqdm=False))
    (first,) = following([prompt])
    beginnings = sorted(first, key=lambda token: -first[token])[:12]
    second = following([(*prompt, token) for token in beginnings])
    pairs = {
        (*prompt, a, b): first[a] + logprob
        for a, likely in zip(beginnings, second, strict=True)
        for b, logprob in likely.items()
    }
    expected = sorted(pairs.values(), reverse=True)[:6]
    (found,) = bundled.beam_search(SUM, BeamSearchParams(beam_width=6, max_tokens=2, ignore_eos=True))
    assert [each.cum_logprob for each in found.sequences] == pytest.approx(expected, abs=1e-9)
    for each in found.sequences:
        assert each.cum_logprob == pytest.approx(pairs[each.tokens], abs=1e-9)
        assert each.finish_reason == "length"


@pytest.mark.parametrize(
    ("prompts", "params", "says"),
    [
        (["a", ""], BeamSearchParams(beam_width=2, max_tokens=2), "prompt 1: the prompt is empty"),
        ("a", SamplingParams(), "beam_search takes BeamSearchParams, got SamplingParams"),
        (None, BeamSearchParams(beam_width=2, max_tokens=2), "prompts must be a prompt or a list of them"),
    ],
)
def test_invalid_beam_searches_are_refused(bundled: LLM, prompts: Any, params: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        bundled.beam_search(prompts, params)


def test_embeddings_are_refused(llm: LLM) -> None:
    with pytest.raises(RequestError, match=r"embed needs a model that computes embeddings, .* use generate or chat"):
        llm.embed(["a"])


# --- options and models ------------------------------------------------------------------------------------------


@pytest.fixture
def _no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr(llm_module, "start_program", refuse)


@pytest.mark.usefixtures("_no_engine")
@pytest.mark.parametrize("model", [5, b"demo", ["demo"], {}])
def test_values_that_are_not_models_are_refused(model: Any) -> None:
    with pytest.raises(ConfigError, match="model must be a folder, an id on the Hugging Face hub or None, got "):
        LLM(model)


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
def test_invalid_options_are_refused_before_the_start(folder: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        LLM(str(folder), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("_no_engine")
def test_a_missing_gpu_is_refused_before_the_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    with pytest.raises(ConfigError, match=r"--device cuda: .* use --device cpu"):
        LLM(str(folder), device="cuda")


@pytest.mark.usefixtures("_no_engine")
def test_invalid_model_folders_are_refused_before_the_start(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        LLM(str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        LLM(str(tmp_path))
    with pytest.raises(CheckpointError, match="there is no shape 'x'; choose one of"):
        LLM("shape:x")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match="has no weights"):
        LLM(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"is truncated: .* download it again"):
        LLM(str(tmp_path))


@pytest.mark.usefixtures("_no_engine")
def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = checkpoints.save("llama", tmp_path / "model", max_shard_size="200KB")
    lost = sorted(folder.glob("*.safetensors"))[-1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=f"lacks 1 of .*{lost.name}"):
        LLM(str(folder))


@pytest.mark.usefixtures("_no_engine")
def test_a_damaged_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    spoiled = Path(shutil.copytree(folder, tmp_path / "model"))
    (spoiled / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json can't be read"):
        LLM(str(spoiled), **SMALL)


def test_a_shape_needs_no_weights() -> None:
    with LLM("shape:llama-10m", kv_cache_memory_bytes="8MiB", max_model_len=32) as dummy:
        assert dummy.options.model_options.load_format == "dummy"
        (output,) = dummy.generate({"prompt_token_ids": [1, 2, 3]}, GREEDY, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 4


def test_the_generation_config_may_set_the_end_of_text_tokens(folder: Path, tmp_path: Path) -> None:
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


@pytest.fixture
def model_with_defaults(tmp_path: Path) -> Path:
    """A copy of the bundled model with its own sampling defaults."""
    folder = Path(shutil.copytree(DEMO_MODEL, tmp_path / "model"))
    generation = {"eos_token_id": [1, 5], "temperature": 0.25, "top_k": 9, "max_new_tokens": 3}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def test_sampling_defaults_are_those_of_the_model(model_with_defaults: Path) -> None:
    with LLM(model_with_defaults, **SMALL) as llm:
        assert llm.default_sampling_params() == SamplingParams(temperature=0.25, top_k=9, max_tokens=3)
        base = SamplingParams(top_p=0.5, max_tokens=None)
        assert llm.default_sampling_params(base) == SamplingParams(temperature=0.25, top_k=9, top_p=0.5, max_tokens=3)
        outputs = llm.generate(["Count from 3 to 9:"] * 2, use_tqdm=False)
        assert {len(output.outputs[0].token_ids) for output in outputs} == {3}
        (own,) = llm.generate("Count from 3 to 9:", SamplingParams(max_tokens=5, ignore_eos=True), use_tqdm=False)
        assert len(own.outputs[0].token_ids) == 5, "given parameters are not mixed with the defaults"


@pytest.mark.parametrize("base", [5, {"temperature": 0}, "greedy", []])
def test_default_sampling_params_checks_its_argument(llm: LLM, base: Any) -> None:
    with pytest.raises(RequestError, match="default_sampling_params takes SamplingParams or None, got "):
        llm.default_sampling_params(base)


def test_sampling_defaults_of_the_model_may_be_ignored(model_with_defaults: Path) -> None:
    with LLM(model_with_defaults, generation_config="vllm", **SMALL) as llm:
        assert llm.default_sampling_params() == SamplingParams()


@pytest.mark.usefixtures("_no_engine")
def test_invalid_sampling_defaults_are_refused(model_with_defaults: Path) -> None:
    (model_with_defaults / "generation_config.json").write_text('{"temperature": -1}')
    with pytest.raises(CheckpointError, match=r"generation_config\.json: temperature must be at least 0"):
        LLM(model_with_defaults, **SMALL)


# --- replicas ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_replicas_give_the_same_outputs_as_one_engine(bundled: LLM) -> None:
    talks: Any = [[{"role": "user", "content": f"{i} + {i} ="}] for i in range(6)]
    chosen = StructuredOutputsParams(choice=["yes", "no", "perhaps"])
    params = [
        SamplingParams(temperature=0, max_tokens=8, structured_outputs=chosen if i % 2 else None) for i in range(6)
    ]
    layout: dict[str, Any] = {"data_parallel_size": 2, "distributed_executor_backend": "threads"}
    with LLM(**SMALL, **layout) as replicas:
        found = replicas.chat(talks, params, use_tqdm=False)
        assert replicas.stats().max_model_len == bundled.stats().max_model_len
        assert len(replicas.stats().replicas) == 2
    expected = bundled.chat(talks, params, use_tqdm=False)
    assert [output.outputs[0].text for output in found] == [output.outputs[0].text for output in expected]
    assert all(output.outputs[0].text in ("yes", "no", "perhaps") for output in found[1::2])


@pytest.mark.usefixtures("_no_engine")
def test_impossible_replicas_are_refused_before_the_start(folder: Path) -> None:
    with pytest.raises(ConfigError, match="--max-model-len 256"):
        LLM(folder, data_parallel_size=2, kv_cache_memory_bytes=100_000, max_model_len=256)
    with pytest.raises(ConfigError, match="uni"):
        LLM(folder, data_parallel_size=2, distributed_executor_backend="uni", **SMALL)


# --- closing, errors and interrupts ------------------------------------------------------------------------------


def test_a_closed_llm_refuses_calls(folder: Path) -> None:
    llm = LLM(str(folder), **SMALL)
    llm.close()
    llm.close()
    with pytest.raises(ClosedError, match="was closed"):
        llm.generate({"prompt_token_ids": [5]}, GREEDY, use_tqdm=False)
    with pytest.raises(ClosedError, match="was closed"):
        llm.stats()


def test_a_with_statement_closes_after_an_error(folder: Path) -> None:
    with pytest.raises(KeyError), LLM(str(folder), **SMALL) as llm:
        raise KeyError
    with pytest.raises(ClosedError):
        llm.stats()


def test_closing_a_run_leaves_the_engine_usable(llm: LLM) -> None:
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


def test_an_error_in_the_source_of_jobs_leaves_the_engine_usable(llm: LLM) -> None:
    def jobs() -> Iterator[Any]:
        yield llm.prepare(0, {"prompt_token_ids": [5]}, GREEDY)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        list(llm.run(jobs()))
    assert llm.stats().running == llm.stats().waiting == 0
    assert len(llm.generate({"prompt_token_ids": [5]}, GREEDY, use_tqdm=False)) == 1


def test_an_interrupt_in_the_middle_of_a_step_ends_the_engine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a rank in this process the state after half a step is unknown, so the engine has failed."""
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


@pytest.mark.slow
def test_interleaved_runs_get_all_their_outputs(llm: LLM) -> None:
    """The run that asks the engine first gets the updates of the other run too."""
    jobs = [[llm.prepare(i, {"prompt_token_ids": [5 + i + 10 * run]}, GREEDY) for i in range(4)] for run in range(2)]
    alone = [dict(llm.run(some)) for some in jobs]
    first, second = llm.run(jobs[0]), llm.run(jobs[1])
    together: list[dict[int, RequestOutput]] = [{}, {}]
    for (i, a), (j, b) in zip(first, second, strict=True):
        together[0][i], together[1][j] = a, b
    assert [{i: o.outputs for i, o in run.items()} for run in together] == [
        {i: o.outputs for i, o in run.items()} for run in alone
    ]


@pytest.mark.slow
def test_without_max_tokens_an_output_fills_the_context(llm: LLM) -> None:
    (output,) = llm.generate(
        {"prompt_token_ids": [5]}, SamplingParams(max_tokens=None, ignore_eos=True), use_tqdm=False
    )
    assert len(output.outputs[0].token_ids) == llm.stats().max_model_len - 1


def test_a_seed_of_minus_one_means_no_seed() -> None:
    assert SamplingParams(seed=-1).seed is None


def test_a_model_may_be_given_as_a_path(folder: Path) -> None:
    with LLM(folder, **SMALL) as llm:
        assert llm.options.model == str(folder)


@pytest.mark.parametrize(("model", "name"), [(None, "bundled"), ("bundled", "bundled"), ("bundled:moe", "bundled:moe")])
def test_bundled_models_may_be_given_by_their_names(model: str | None, name: str) -> None:
    """This holds for the model and for the draft model."""
    opened = open_model(model, {**SMALL, "speculative_config": {"model": "bundled"}})
    assert opened.name == name
    assert opened.plan.model.folder == str(
        DEMO_MODEL.parent / ("demo_moe_model" if name == "bundled:moe" else "demo_model")
    )
    assert opened.plan.draft is not None
    assert opened.plan.draft.folder == str(DEMO_MODEL)


@pytest.fixture
def without_tokenizer(tmp_path: Path) -> Path:
    """A copy of the bundled model without its tokenizer, so that a test shows whether another one is used."""
    folder = tmp_path / "without"
    shutil.copytree(DEMO_MODEL, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"engine_process": True}], ids=str)
def test_the_tokenizer_may_be_in_another_folder(without_tokenizer: Path, options: dict[str, Any]) -> None:
    """It is used for prompts, chats and structured outputs. The engine follows the latter, wherever it runs."""
    with LLM(without_tokenizer, tokenizer=DEMO_MODEL, **SMALL, **options) as llm:
        (output,) = llm.generate("37 + 45 =", GREEDY, use_tqdm=False)
        assert output.outputs[0].text.startswith(" 82")
        (answer,) = llm.chat([{"role": "user", "content": "37 + 45 ="}], SamplingParams(temperature=0), use_tqdm=False)
        assert answer.outputs[0].text.startswith("37 + 45 = 82")
        wanted = StructuredOutputsParams(regex="[a-c]{3}")
        params = SamplingParams(temperature=0, max_tokens=8, structured_outputs=wanted)
        (letters,) = llm.generate("37 + 45 =", params, use_tqdm=False)
        assert len(letters.outputs[0].text) == 3
        assert set(letters.outputs[0].text) <= set("abc")


def test_the_chat_template_comes_with_the_tokenizer(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(DEMO_MODEL, tmp_path / "other", ignore=shutil.ignore_patterns("model*")))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ messages[0]['content'] }} ="
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    reader = open_model(None, {**SMALL, "tokenizer": str(folder)}).reader()
    job = reader.prepare_chat(0, [{"role": "user", "content": "37 + 45"}], GREEDY)
    assert reader.prepare(0, "37 + 45 =", GREEDY).tokens[1:] == job.tokens


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "has no tokenizer; it needs a tokenizer.json or the like"),
        ("nowhere/at/all", "nowhere/at/all is not a folder"),
        ("large", r"has token ids up to 1000, the model only up to 639: choose the tokenizer that the model"),
    ],
)
def test_a_missing_or_unsuitable_tokenizer_is_refused(tmp_path: Path, name: str, says: str) -> None:
    if name == "large":
        (tmp_path / name).mkdir()
        content = json.loads((DEMO_MODEL / "tokenizer.json").read_text())
        content["model"]["vocab"]["a long word"] = 1000
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(content))
    given = name if "/" in name else str(tmp_path / name)
    with pytest.raises(UserError, match=says):
        LLM(tokenizer=given, **SMALL)


def test_a_tokenizer_with_few_tokens_gives_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizers.metaspace().save(str(tmp_path / "tokenizer.json"))
    with caplog.at_level("WARNING", logger="shoal"):
        open_model(None, {**SMALL, "tokenizer": str(tmp_path)})
    assert f"{tmp_path} has 9 tokens, the model has 640: is it the tokenizer" in caplog.text
    caplog.clear()
    open_model(None, {**SMALL, "tokenizer": str(DEMO_MODEL)})
    assert "is it the tokenizer" not in caplog.text


def test_the_tokenizer_may_have_its_own_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def locate(model: str | None, revision: str | None = None, *, weights: bool = True) -> Path:
        asked.append((model, revision, weights))
        return DEMO_MODEL

    monkeypatch.setattr(hub, "locate", locate)
    open_model("org/model", {**SMALL, "revision": "a", "tokenizer_revision": "b"})
    open_model("org/model", {**SMALL, "tokenizer": "org/other"})
    assert asked == [
        ("org/model", "a", True),
        ("org/model", "b", False),
        ("org/model", None, True),
        ("org/other", None, False),
    ]


@pytest.mark.slow
def test_a_relative_path_is_resolved_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Files that are read later, by this process or by another, are found from any working directory.

    The tokenizer is in another folder than the model.
    """
    shutil.copytree(DEMO_MODEL, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    shutil.copytree(DEMO_MODEL, tmp_path / "tokens")
    monkeypatch.chdir(tmp_path)
    options = {**SMALL, "tokenizer": "tokens", "data_parallel_size": 2, "speculative_config": {"model": "model"}}
    opened = open_model("model", options)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert opened.name == "model"
    with LLM(opened) as llm:  # its replicas start in the other folder
        (output,) = llm.chat([{"role": "user", "content": "3 + 4"}], GREEDY, use_tqdm=False)
        schema = StructuredOutputsParams(regex="[0-9]{2}")
        (number,) = llm.generate(
            "3 + 4 =", SamplingParams(temperature=0, max_tokens=8, structured_outputs=schema), use_tqdm=False
        )
    assert output.outputs[0].token_ids
    assert number.outputs[0].text.isdigit()
