"""Checks of prompts and parameters against the model, before anything runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import shoal
from shoal.errors import RequestError
from shoal.params import SamplingParams, StructuredOutputsParams
from shoal.text.chat_template import ChatTemplate
from shoal.text.prompts import Job, PromptReader
from shoal.text.tokenizer import Tokenizer, open_tokenizer
from support.letters import Letters

VOCABULARY = 640
MAX_MODEL_LEN = 32
HUGE = 10**5000  # too long for Python to print
PLAIN = SamplingParams()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    found = open_tokenizer(Path(shoal.__file__).parent / "demo_model")
    assert found is not None
    return found


def reader(
    tokenizer: Tokenizer | None = None, *, vocab_size: int = VOCABULARY, chat_template: str | None = None
) -> PromptReader:
    template = None if chat_template is None else ChatTemplate({"default": chat_template})
    return PromptReader(
        tokenizer, vocab_size=vocab_size, max_model_len=MAX_MODEL_LEN, eos=(1, 5), chat_template=lambda: template
    )


def refused(says: str, prepare: Callable[..., Job], *arguments: Any, **other: Any) -> None:
    with pytest.raises(RequestError) as caught:
        prepare(0, *arguments, **other)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


# --- prompts -----------------------------------------------------------------------------------------------------


def test_a_text_and_its_tokens(tokenizer: Tokenizer) -> None:
    found = reader(tokenizer).prepare(3, "1 + 1 =", PLAIN)
    assert (found.index, found.prompt, found.params) == (3, "1 + 1 =", PLAIN)
    assert found.tokens == tuple(tokenizer.encode("1 + 1 ="))
    given = reader().prepare(4, {"prompt_token_ids": list(found.tokens)}, PLAIN)
    assert given == Job(4, None, found.tokens, PLAIN)


@pytest.mark.parametrize("token", [VOCABULARY, -1, True, 1.0, "1", None, HUGE], ids=type)
def test_token_ids_beyond_the_vocabulary(token: Any) -> None:
    refused(
        f"is not a token id: the vocabulary has {VOCABULARY} tokens",
        reader().prepare,
        {"prompt_token_ids": [1, token]},
        PLAIN,
    )


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ({"prompt_token_ids": []}, "the prompt is empty"),
        ("", "the prompt is empty"),
        (
            {"prompt_token_ids": [3] * 32},
            "maximum context length is 32 tokens; the prompt has 32 tokens, but the output needs at least one",
        ),
        ({"prompt_token_ids": {1}}, "prompt_token_ids must be a list of integers"),
        ({}, "a prompt is a text or has prompt_token_ids, got dict"),
        ({"prompt": 7}, "a prompt is a text or has prompt_token_ids"),
        (["a"], "a prompt is a text or has prompt_token_ids, got list"),
        ("a\ud800", "the prompt is not valid Unicode: surrogates not allowed at character 1"),
    ],
)
def test_invalid_prompts(prompt: Any, says: str, tokenizer: Tokenizer) -> None:
    refused(says, reader(tokenizer).prepare, prompt, PLAIN)


def test_a_tokenizer_of_another_model(tokenizer: Tokenizer) -> None:
    small = reader(tokenizer, vocab_size=20)
    refused("tokenizer and model do not match", small.prepare, "hello", PLAIN)


def test_texts_need_a_tokenizer() -> None:
    for prompt in ("a", {"prompt": "a"}):
        refused("no tokenizer: give prompt_token_ids", reader().prepare, prompt, PLAIN)


# --- parameters --------------------------------------------------------------------------------------------------

TOKENS: Any = {"prompt_token_ids": [7]}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("logit_bias", {5: 1.0, VOCABULARY: 1.0}),
        ("allowed_token_ids", [VOCABULARY, 1]),
        ("stop_token_ids", [0, VOCABULARY]),
    ],
)
def test_ids_beyond_the_vocabulary_are_named(name: str, values: Any) -> None:
    params = SamplingParams(**{name: values})
    says = f"{name} must hold ids of the model's vocabulary, in [0, {VOCABULARY}), got {VOCABULARY}"
    refused(says, reader().prepare, TOKENS, params)
    reader(vocab_size=VOCABULARY + 1).prepare(0, TOKENS, params)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"allowed_token_ids": [7], "stop_token_ids": [7], "min_tokens": 3}, "min_tokens with"),
        ({"allowed_token_ids": [7, 5], "stop_token_ids": [7, 8], "min_tokens": 1}, "min_tokens with"),  # 5 is an eos
        ({"allowed_token_ids": [1], "min_tokens": 1}, "min_tokens with"),
        ({"allowed_token_ids": [97], "bad_words": ["a"]}, "bad_words with"),
        ({"allowed_token_ids": [97, 5], "bad_words": ["a"], "min_tokens": 2}, "min_tokens and bad_words with"),
    ],
)
def test_parameters_that_allow_no_token_are_refused(values: dict[str, Any], named: str) -> None:
    says = f"{named} allowed_token_ids {values['allowed_token_ids']} leave no token to draw"
    refused(says, reader(Letters()).prepare, TOKENS, SamplingParams(**values))


@pytest.mark.parametrize(
    "values",
    [
        {"allowed_token_ids": [7], "stop_token_ids": [7]},
        {"allowed_token_ids": [7, 6], "stop_token_ids": [7], "min_tokens": 3},
        {"allowed_token_ids": [5], "min_tokens": 3, "ignore_eos": True},
        {"allowed_token_ids": [97, 98], "bad_words": ["a"]},
        {"allowed_token_ids": [97], "bad_words": ["ab"]},
        {"stop_token_ids": [7], "min_tokens": 3},
    ],
)
def test_parameters_that_allow_a_token(values: dict[str, Any]) -> None:
    params = SamplingParams(**values)
    assert reader(Letters()).prepare(0, TOKENS, params).params is params


def test_bad_words_are_banned_at_the_start_and_after_a_space() -> None:
    params = SamplingParams(bad_words=["ab", " c", "d e"])
    found = reader(Letters()).prepare(0, "x", params)
    spelled = ["ab", " ab", " c", "d e", " d e"]
    assert found.banned == tuple(tuple(map(ord, text)) for text in spelled), "without special tokens, each once"


def test_bad_words_have_the_tokens_that_the_model_writes(tokenizer: Tokenizer) -> None:
    found = reader(tokenizer).prepare(0, "a", SamplingParams(bad_words=["red"]))
    assert [tokenizer.decode(ids) for ids in found.banned] == ["red", " red"]


def test_bad_words_without_tokens(tokenizer: Tokenizer) -> None:
    refused("no tokenizer", reader().prepare, TOKENS, SamplingParams(bad_words=["a"]))
    says = "a text of bad_words is not valid Unicode: surrogates not allowed at character 0"
    refused(says, reader(tokenizer).prepare, TOKENS, SamplingParams(bad_words=["\udc80"]))
    assert reader().prepare(0, TOKENS, PLAIN).banned == ()


def test_stop_texts_need_a_tokenizer(tokenizer: Tokenizer) -> None:
    params = SamplingParams(stop="a")
    refused("stop takes texts, and this model has no tokenizer: use stop_token_ids", reader().prepare, TOKENS, params)
    assert reader(tokenizer).prepare(0, TOKENS, params).params is params


def test_structured_outputs_become_a_grammar(tokenizer: Tokenizer) -> None:
    of = reader(tokenizer)
    params = SamplingParams(structured_outputs=StructuredOutputsParams(choice=["a", "b"]))
    found = of.prepare(0, TOKENS, params)
    assert found.grammar
    assert of.prepare(1, "x", params).grammar == found.grammar
    assert of.prepare(2, "x", PLAIN).grammar == ""


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ({"choice": []}, "structured_outputs.choice needs at least one text"),
        ({"json": "{"}, "structured_outputs.json is not JSON"),
        ({"json": "false"}, "no text satisfies the schema false"),
    ],
)
def test_structured_outputs_that_can_not_be_obeyed(kind: dict[str, Any], says: str, tokenizer: Tokenizer) -> None:
    refused(says, reader(tokenizer).prepare, TOKENS, SamplingParams(structured_outputs=StructuredOutputsParams(**kind)))


def test_structured_outputs_need_a_tokenizer() -> None:
    params = SamplingParams(structured_outputs=StructuredOutputsParams(json_object=True))
    refused("structured_outputs needs a tokenizer, which this model does not have", reader().prepare, TOKENS, params)


# --- conversations -----------------------------------------------------------------------------------------------

MESSAGES = [{"role": "user", "content": "hi"}]
TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}>{% endif %}"


def test_a_conversation_has_only_the_special_tokens_of_its_template() -> None:
    found = reader(Letters(), chat_template=TEMPLATE).prepare_chat(6, MESSAGES, PLAIN)
    assert (found.index, found.prompt) == (6, "user:hi;>")
    assert found.tokens == tuple(map(ord, "user:hi;>"))
    assert Letters().encode("a")[0] == 1, "a plain prompt begins with a special token"


def test_a_given_template_is_used() -> None:
    for own in (None, "something else"):
        found = reader(Letters(), chat_template=own).prepare_chat(
            0, MESSAGES, PLAIN, chat_template=TEMPLATE, add_generation_prompt=False
        )
        assert found.prompt == "user:hi;"


def test_values_for_the_template_may_have_any_name() -> None:
    of = reader(Letters(), chat_template="{{ index }}{{ params }}{{ self_ }}")
    found = of.prepare_chat(0, MESSAGES, PLAIN, chat_template_kwargs={"index": 3, "params": "p", "self_": None})
    assert found.prompt == "3pNone"


def test_a_model_without_a_template_takes_plain_prompts() -> None:
    says = "this model has no chat template: give chat_template, or plain prompts"
    refused(says, reader(Letters()).prepare_chat, MESSAGES, PLAIN)


def test_tokens_of_long_conversations_are_counted() -> None:
    of = reader(Letters(), chat_template=TEMPLATE)
    messages = [{"role": "user", "content": "x" * 30}]
    assert len(of.chat_tokens(messages)) == 37
    with pytest.raises(RequestError, match="role must be a string"):
        of.chat_tokens([{"content": "hi"}])


def test_a_conversation_is_checked_like_a_prompt() -> None:
    of = reader(Letters(), chat_template=TEMPLATE)
    refused(
        "length is 32 tokens; the prompt has 37 tokens, but the output needs at least one: shorten it",
        of.prepare_chat,
        [{"role": "user", "content": "x" * 30}],
        PLAIN,
    )
    refused("the prompt is empty", of.prepare_chat, MESSAGES, PLAIN, chat_template="{{ '' }}")
    refused("stop_token_ids", of.prepare_chat, MESSAGES, SamplingParams(stop_token_ids=[VOCABULARY]))
    refused("no tokenizer", reader(chat_template=TEMPLATE).prepare_chat, MESSAGES, PLAIN)
    refused("messages is empty", of.prepare_chat, [], PLAIN)
    refused("messages must be a list of objects", of.prepare_chat, "hi", PLAIN)
    refused("message 0: role must be a string", of.prepare_chat, [{"content": "hi"}], PLAIN)


# --- truncated prompts, and salts --------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["One two three four", {"prompt_token_ids": [7, 8, 9, 10, 11]}])
def test_a_prompt_is_cut_to_its_last_tokens(tokenizer: Tokenizer, prompt: Any) -> None:
    found = reader(tokenizer)
    whole = found.prepare(0, prompt, PLAIN).tokens
    for keep in (1, 3, len(whole), len(whole) + 1):
        assert found.prepare(0, prompt, SamplingParams(truncate_prompt_tokens=keep)).tokens == whole[-keep:]


@pytest.mark.parametrize("text", ["a b " * 5000, "x" * 20_000, "\U0001f41f" * 3000])
def test_a_long_text_is_cut_to_the_context_length(tokenizer: Tokenizer, text: str) -> None:
    job = reader(tokenizer).prepare(0, text, SamplingParams(truncate_prompt_tokens=-1))
    assert job.tokens == tuple(tokenizer.encode(text))[-(MAX_MODEL_LEN - 1) :]


def test_a_length_beyond_the_context_length_is_refused(tokenizer: Tokenizer) -> None:
    long = SamplingParams(truncate_prompt_tokens=MAX_MODEL_LEN + 1)
    refused("truncate_prompt_tokens must be at most --max-model-len, 32", reader(tokenizer).prepare, "Hi", long)


def test_salts() -> None:
    ids = [7, 8]
    assert reader().prepare(0, {"prompt_token_ids": ids, "cache_salt": "a"}, PLAIN).cache_salt == "a"
    assert reader().prepare(0, {"prompt_token_ids": ids}, PLAIN).cache_salt == ""
    for wrong in ("", 5, b"a"):
        prompt = {"prompt_token_ids": ids, "cache_salt": wrong}
        refused("cache_salt must be a string that is not empty", reader().prepare, prompt, PLAIN)


def test_parameters_are_prepared_once_for_all_prompts_of_a_request() -> None:
    counted: list[str] = []
    letters = Letters()

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(letters, name)

        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            counted.append(text)
            return letters.encode(text, add_special_tokens=add_special_tokens)

    reader = PromptReader(Counting(), vocab_size=1000, max_model_len=100)
    params = SamplingParams(bad_words=["b"])
    jobs = [reader.prepare(i, "a", params) for i in range(5)]
    assert all(job.banned is jobs[0].banned for job in jobs)
    assert len(counted) == 5 + 2, "five prompts, and the bad word with and without a space"
    assert reader.prepare(0, "a", SamplingParams()).banned == ()
