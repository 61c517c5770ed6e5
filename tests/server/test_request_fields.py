"""Fields of requests that vLLM has and OpenAI does not, with a fake engine."""

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from shoal.errors import RequestError, context_length_exceeded, structured_outputs_error
from shoal.server.app import openai_app
from shoal.server.settings import ServerSettings
from support.fake_backend import FakeBackend

COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
ASKED: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "Count from 3 to 9:"},
    CHAT: {"messages": [{"role": "user", "content": "Count from 3 to 9:"}]},
    RESPONSES: {"input": "Count from 3 to 9:"},
}
CALL = '<tool_call>{"name": "weather", "arguments": {"a": 1}}</tool_call>'
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def ask(path: str, backend: FakeBackend | None = None, settings: ServerSettings | None = None, **body: Any) -> Any:
    app = openai_app(backend or FakeBackend(), settings or ServerSettings(tool_call_parser="hermes"))
    client = TestClient(app, raise_server_exceptions=False, headers={"content-type": "application/json"})
    return client.post(path, content=json.dumps({**ASKED[path], **body}))


def chunks(text: str) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]


# --- names and salts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "name"), [(COMPLETIONS, "cmpl-mine.1"), (CHAT, "chatcmpl-mine.1"), (RESPONSES, "mine.1")]
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_has_the_id_of_the_request(path: str, name: str, stream: bool) -> None:
    answer = ask(path, request_id="mine.1", stream=stream)
    assert answer.status_code == 200, answer.text
    assert f'"id":"{name}"' in answer.text


@pytest.mark.parametrize("path", list(ASKED))
@pytest.mark.parametrize(
    "body",
    [{"request_id": ""}, {"request_id": "a\nb"}, {"request_id": "x" * 200}, {"cache_salt": ""}, {"cache_salt": 7}],
)
def test_an_invalid_request_id_or_salt_is_refused(path: str, body: dict[str, Any]) -> None:
    answer = ask(path, **body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, next(iter(body)))


@pytest.mark.parametrize("path", list(ASKED))
@pytest.mark.parametrize("salt", ["a", "é", "x" * 10_000])
def test_a_salt_reaches_the_prompt(path: str, salt: str) -> None:
    backend = FakeBackend()
    assert ask(path, backend, cache_salt=salt).status_code == 200
    assert [stream.job.cache_salt for stream in backend.streams] == [salt]


def test_a_salt_reaches_prompts_of_ids_and_each_prompt_of_a_list() -> None:
    backend = FakeBackend()
    assert ask(COMPLETIONS, backend, prompt=[[5, 6], [7]], cache_salt="a").status_code == 200
    assert [(stream.job.tokens, stream.job.cache_salt) for stream in backend.streams] == [((5, 6), "a"), ((7,), "a")]


# --- refusals that come from the engine ----------------------------------------------------------------------------

SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
TEXT = {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}}


@pytest.mark.parametrize(
    ("path", "body", "error", "status", "param", "message"),
    [
        (COMPLETIONS, {}, context_length_exceeded(9, "x"), 400, "prompt", "this model's"),
        (CHAT, {}, context_length_exceeded(9, "x"), 400, "messages", "this model's"),
        (RESPONSES, {}, context_length_exceeded(9, "x"), 400, "input", "this model's"),
        (COMPLETIONS, {"guided_regex": "a"}, structured_outputs_error(": x"), 422, "guided_regex", "guided_regex: x"),
        (CHAT, {"response_format": SCHEMA}, structured_outputs_error(": x"), 422, "response_format", "response_format"),
        (RESPONSES, {"text": TEXT}, structured_outputs_error(": x"), 422, "text.format", "text.format: x"),
        (CHAT, {}, RequestError("there is no replica 7", "data_parallel_rank"), 400, "data_parallel_rank", "there is"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_by_the_engine_names_the_field_that_the_client_sent(
    path: str, body: dict[str, Any], error: RequestError, status: int, param: str, message: str, stream: bool
) -> None:
    answer = ask(path, FakeBackend(error=error), **body, stream=stream)
    found = answer.json()["error"]
    assert (answer.status_code, found["param"]) == (status, param), found
    assert found["code"] == (error.code or "invalid_value")
    assert found["message"].startswith(message)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_refusal_within_a_stream_names_the_field_that_the_client_sent(path: str) -> None:
    backend = FakeBackend(error=structured_outputs_error("can't be obeyed: x"), fail_after=1)
    text = ask(path, backend, guided_regex=".*", stream=True).text
    (found,) = [chunk["error"] for chunk in chunks(text) if "error" in chunk]
    assert (found["param"], found["code"]) == ("guided_regex", "unprocessable")
    assert found["message"] == "guided_regex can't be obeyed: x"


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_completions_return_token_ids() -> None:
    backend = FakeBackend()
    answer = ask(COMPLETIONS, backend, n=2, temperature=1, return_token_ids=True).json()
    job = backend.streams[0].job
    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == [list(job.tokens)] * 2
    for index, choice in enumerate(answer["choices"]):
        written = [token for delta in backend.deltas(job, index) for token in delta.token_ids]
        assert choice["token_ids"] == written
    assert answer["usage"]["completion_tokens"] == sum(len(choice["token_ids"]) for choice in answer["choices"])


def test_chats_return_token_ids() -> None:
    backend = FakeBackend()
    answer = ask(CHAT, backend, return_token_ids=True).json()
    job = backend.streams[0].job
    assert answer["prompt_token_ids"] == list(job.tokens)
    assert answer["choices"][0]["token_ids"] == [t for delta in backend.deltas(job, 0) for t in delta.token_ids]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("says", [["Hello", ", ", "wörld"], [CALL[i : i + 4] for i in range(0, len(CALL), 4)]])
def test_token_ids_of_a_stream_are_those_of_the_answer(path: str, says: list[str]) -> None:
    """This holds for text that is held back and for tool calls, too."""
    more: dict[str, Any] = {"tools": [TOOL]} if path == CHAT else {}
    whole = ask(path, FakeBackend(lambda _: says), return_token_ids=True, **more).json()
    parts = chunks(ask(path, FakeBackend(lambda _: says), return_token_ids=True, stream=True, **more).text)
    choices = [choice for chunk in parts for choice in chunk["choices"]]
    ids = [token for choice in choices for token in choice.get("token_ids", ())]
    assert ids == whole["choices"][0]["token_ids"] != []
    places = parts if path == CHAT else choices
    found = [i for i, place in enumerate(places) if "prompt_token_ids" in place]
    expected = whole if path == CHAT else whole["choices"][0]
    assert found == [0]
    assert places[0]["prompt_token_ids"] == expected["prompt_token_ids"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("stream", [False, True])
def test_token_ids_are_returned_only_on_request(path: str, stream: bool) -> None:
    assert "token_ids" not in ask(path, stream=stream).text


def logprobs_of(path: str, answer: Any, stream: bool) -> list[dict[str, Any]]:
    choices = [c for chunk in chunks(answer.text) for c in chunk["choices"]] if stream else answer.json()["choices"]
    return [choice["logprobs"] for choice in choices if choice["logprobs"]]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("by_flag", [False, True])
def test_log_probabilities_may_have_ids_instead_of_texts(stream: bool, by_flag: bool) -> None:
    settings = ServerSettings(return_tokens_as_token_ids=by_flag)
    asked: dict[str, Any] = {"stream": stream} | ({} if by_flag else {"return_tokens_as_token_ids": True})
    backend = FakeBackend(lambda _: ["Hello", " you"])
    answer = ask(COMPLETIONS, backend, settings, logprobs=1, return_token_ids=True, **asked)
    ids = [token for delta in backend.deltas(backend.streams[0].job, 0) for token in delta.token_ids]
    found = logprobs_of(COMPLETIONS, answer, stream)
    assert [name for each in found for name in each["tokens"]] == [f"token_id:{token}" for token in ids]
    assert all(name.startswith("token_id:") for each in found for top in each["top_logprobs"] for name in top)
    assert found[0]["text_offset"][0] == 0
    chat = ask(CHAT, FakeBackend(lambda _: ["Hello", " you"]), settings, logprobs=True, top_logprobs=1, **asked)
    content = [position for each in logprobs_of(CHAT, chat, stream) for position in each["content"]]
    assert [position["token"] for position in content] == [f"token_id:{token}" for token in ids]
    assert bytes(byte for position in content for byte in position["bytes"]).decode() == "Hello you"
    assert all(top["token"] == "token_id:5" for position in content for top in position["top_logprobs"])


def test_the_request_overrides_the_flag() -> None:
    settings = ServerSettings(return_tokens_as_token_ids=True)
    answer = ask(COMPLETIONS, None, settings, logprobs=0, return_tokens_as_token_ids=False)
    assert "token_id:" not in answer.text


# --- parameters that vLLM has -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", list(ASKED))
def test_spaces_between_special_tokens_may_be_left_out(path: str) -> None:
    backend = FakeBackend()
    for wanted in (None, True, False):
        assert ask(path, backend, spaces_between_special_tokens=wanted).status_code == 200
    kept = [stream.job.params.spaces_between_special_tokens for stream in backend.streams]
    assert kept == [True, True, False]
    answer = ask(path, spaces_between_special_tokens=1)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "spaces_between_special_tokens")


@pytest.mark.parametrize("path", list(ASKED))
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"vllm_xargs": {"kv_transfer": 1}}, "`vllm_xargs` has 'kv_transfer', which Shoal does not read: leave it out"),
        ({"vllm_xargs": [1]}, "`vllm_xargs` must be an object"),
        ({"logits_processors": ["a.b"]}, "logits_processors is not supported: tokens are drawn in other processes"),
        ({"thinking_token_budget": 5}, "thinking_token_budget is not supported: Shoal does not know where"),
    ],
)
def test_parameters_that_shoal_lacks_are_refused_by_name(path: str, body: dict[str, Any], message: str) -> None:
    answer = ask(path, **body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, next(iter(body)))
    assert error["message"].startswith(message)


@pytest.mark.parametrize("path", list(ASKED))
@pytest.mark.parametrize(
    "body", [{"vllm_xargs": {}}, {"vllm_xargs": None}, {"logits_processors": []}, {"thinking_token_budget": None}]
)
def test_empty_values_of_parameters_that_shoal_lacks_are_accepted(path: str, body: dict[str, Any]) -> None:
    assert ask(path, **body).status_code == 200


# --- prompts that are cut --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_is_cut_to_its_last_tokens(path: str, stream: bool) -> None:
    backend = FakeBackend()
    ask(path, backend)
    answer = ask(path, backend, truncate_prompt_tokens=5, stream=stream)
    assert answer.status_code == 200, answer.text
    whole, cut = (each.job.tokens for each in backend.streams)
    assert cut == whole[-5:]


def test_an_echo_shows_the_tokens_that_were_kept() -> None:
    backend = FakeBackend()
    answer = ask(COMPLETIONS, backend, truncate_prompt_tokens=3, echo=True, logprobs=0).json()
    (choice,) = answer["choices"]
    kept = backend.streams[0].job.tokens
    shown = backend.tokenizer.decode(kept, skip_special_tokens=False)
    assert len(kept) == answer["usage"]["prompt_tokens"] == 3
    assert choice["text"] == shown + "Hello, wörld 🐟"
    assert "".join(choice["logprobs"]["tokens"][:3]) == shown


def test_a_prompt_that_is_far_too_long_is_cut_to_the_context_length() -> None:
    backend = FakeBackend()
    text = "One two three. " * 20_000
    assert ask(COMPLETIONS, backend, prompt=text).status_code == 400
    assert ask(COMPLETIONS, backend, prompt=text, truncate_prompt_tokens=-1).status_code == 200
    kept = backend.streams[0].job.tokens
    assert len(kept) == backend.max_model_len - 1
    assert kept == tuple(backend.tokenizer.encode(text, add_special_tokens=True)[-len(kept) :])
    assert ask(COMPLETIONS, backend, prompt=[5] * 9000 + [6], truncate_prompt_tokens=2).status_code == 200
    assert backend.streams[1].job.tokens == (5, 6)


@pytest.mark.parametrize("value", [0, -2, 513, 10**30, True, 1.5])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_invalid_lengths_to_cut_to_are_refused(path: str, value: Any) -> None:
    answer = ask(path, truncate_prompt_tokens=value)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "truncate_prompt_tokens")
