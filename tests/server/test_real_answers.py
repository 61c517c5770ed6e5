"""The endpoints with an `AsyncLLM` of the bundled model give what `LLM` gives."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from shoal import LLM, SamplingParams
from shoal.llm.async_llm import AsyncLLM
from shoal.server.app import openai_app
from shoal.server.settings import ServerSettings

PROMPTS = ["Once upon a time", "The capital of Belgium is"]
OPTIONS: dict[str, Any] = {"kv_cache_memory_bytes": "32M", "distributed_executor_backend": "uni"}
pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    llm = AsyncLLM(None, **OPTIONS)
    try:
        with TestClient(openai_app(llm, ServerSettings())) as found:
            yield found
    finally:
        llm.close()


@pytest.fixture(scope="module")
def offline() -> Iterator[LLM]:
    with LLM(**OPTIONS) as found:
        yield found


def test_texts_are_those_of_llm(client: TestClient, offline: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=8)
    expected = [output.outputs[0].text for output in offline.generate(PROMPTS, params, use_tqdm=False)]
    body = {"prompt": PROMPTS, "temperature": 0, "max_tokens": 8}
    answer = client.post("/v1/completions", json=body).json()
    assert [choice["text"] for choice in answer["choices"]] == expected


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_log_likelihoods_are_those_of_llm(client: TestClient, offline: LLM, max_tokens: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    outputs = offline.generate(PROMPTS, params, use_tqdm=False)
    prompts = [list(output.prompt_token_ids) for output in outputs]
    body = {"prompt": prompts, "temperature": 0, "max_tokens": max_tokens, "echo": True, "logprobs": 1}
    answer = client.post("/v1/completions", json=body).json()
    for choice, output in zip(answer["choices"], outputs, strict=True):
        assert output.prompt_logprobs is not None
        known = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        expected = [each[token].logprob for token, each in known if each is not None]
        found = choice["logprobs"]["token_logprobs"]
        assert found[0] is None
        assert found[1 : len(expected) + 1] == pytest.approx(expected, abs=1e-4)
        assert len(found) == len(expected) + 1 + max_tokens


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "pick"}}])
def test_a_required_call_is_made_by_a_model_without_training_for_it(client: TestClient, choice: Any) -> None:
    schema = {
        "type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False,
    }  # fmt: skip
    tool = {"type": "function", "function": {"name": "pick", "parameters": schema}}
    body = {
        "messages": [{"role": "user", "content": "hi"}], "tools": [tool], "tool_choice": choice, "temperature": 0,
        "parallel_tool_calls": False, "max_tokens": 300,
    }  # fmt: skip
    (call,) = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "pick"
    assert '"n"' in call["function"]["arguments"]


def test_a_replica_that_does_not_exist_is_refused(client: TestClient) -> None:
    answer = client.post("/v1/completions", json={"prompt": "a", "data_parallel_rank": 7})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "data_parallel_rank")


# --- characters of several tokens ----------------------------------------------------------------------------------

WORDS = "日本 🦊!"
SAYS_WORDS: dict[str, Any] = {"structured_outputs": {"choice": [WORDS]}, "max_tokens": 40}


def events(answer: Any) -> list[Any]:
    return [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line.startswith("data: {")]


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_a_chat_have_the_bytes_of_its_text(client: TestClient, stream: bool) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 2, **SAYS_WORDS}
    answer = client.post("/v1/chat/completions", json={**body, "stream": stream})
    choices = [part["choices"][0] for part in (events(answer) if stream else [answer.json()])]
    content = [each for choice in choices for each in (choice["logprobs"] or {"content": []})["content"]]
    assert b"".join(bytes(each["bytes"]) for each in content) == WORDS.encode()
    assert (content[0]["token"], content[0]["bytes"]) == ("\\xe6", [0xE6])
    assert all(bytes(top["bytes"]) != "\ufffd".encode() for each in content for top in each["top_logprobs"])


def test_log_probabilities_of_a_response_have_the_bytes_of_its_text(client: TestClient) -> None:
    body = {"input": "hi", "include": ["message.output_text.logprobs"], "top_logprobs": 1, "max_output_tokens": 40}
    answer = client.post("/v1/responses", json=body | {"structured_outputs": SAYS_WORDS["structured_outputs"]}).json()
    (part,) = answer["output"][0]["content"]
    assert part["text"] == WORDS
    assert b"".join(bytes(each["bytes"]) for each in part["logprobs"]) == WORDS.encode()


@pytest.mark.parametrize(("echo", "before"), [(False, ""), (True, "é日x")])
@pytest.mark.parametrize("stop", [None, ["🦊"]])
def test_text_offsets_point_into_the_returned_text(
    client: TestClient, echo: bool, before: str, stop: list[str] | None
) -> None:
    body = {"prompt": "é日x", "echo": echo, "logprobs": 1, "stop": stop, **SAYS_WORDS}
    (choice,) = client.post("/v1/completions", json=body).json()["choices"]
    text, logprobs = choice["text"], choice["logprobs"]
    assert text == before + (WORDS if stop is None else "日本 ")
    for name, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if name not in ("<|bos|>",) and not name.startswith("bytes:"):
            assert text[offset : offset + len(name)] == name
        assert offset <= len(text)
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    chunks = [each["choices"][0] for each in events(client.post("/v1/completions", json={**body, "stream": True}))]
    for field in ("tokens", "text_offset"):
        assert [each for chunk in chunks for each in chunk["logprobs"][field]] == logprobs[field]


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_that_ends_within_a_character_is_continued_by_the_output(client: TestClient, stream: bool) -> None:
    tokens = client.post("/tokenize", json={"prompt": "ab日c"}).json()["tokens"]
    body = {"prompt": tokens[:4], "echo": True, "logprobs": 0, "max_tokens": 1, "stream": stream, "temperature": 0}
    for cut, expected in ((4, "<|bos|>ab\ufffd"), (5, "<|bos|>ab日"), (6, "<|bos|>ab日c")):
        answer = client.post(
            "/v1/completions", json=body | {"prompt": tokens[:cut], "logit_bias": {str(tokens[cut]): 100}}
        )
        choices = [part["choices"][0] for part in (events(answer) if stream else [answer.json()])]
        assert "".join(choice["text"] for choice in choices) == expected
        offsets = [each for choice in choices for each in choice["logprobs"]["text_offset"]]
        assert offsets == [0, 7, 8, 9, 9, 9, 10][: cut + 1]
    alone = client.post("/v1/completions", json=body | {"max_tokens": 0, "stream": False}).json()
    assert alone["choices"][0]["text"] == "<|bos|>ab\ufffd"
