"""The endpoints over an `AsyncLLM` with the bundled model, against what `LLM` gives."""

from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from shoal import LLM, SamplingParams
from shoal.frontend.async_llm import AsyncLLM
from shoal.server.app import openai_app
from shoal.server.settings import ServerSettings

PROMPTS = ["Once upon a time", "The capital of Belgium is"]
OPTIONS: dict[str, Any] = {"kv_cache_memory_bytes": "32M", "distributed_executor_backend": "uni"}
pytestmark = pytest.mark.timeout(300)


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
def test_a_demanded_call_comes_from_any_model(client: TestClient, choice: Any) -> None:
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


def test_a_replica_that_is_not_there(client: TestClient) -> None:
    answer = client.post("/v1/completions", json={"prompt": "a", "data_parallel_rank": 7})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "data_parallel_rank")
