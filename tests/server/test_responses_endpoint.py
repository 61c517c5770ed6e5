"""/v1/responses with a fake engine. Answers and events are checked with the types of OpenAI's client."""

import json
from typing import Any

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from starlette.testclient import TestClient

from shoal.errors import EngineError, QueueFull
from shoal.server.app import openai_app
from shoal.server.settings import ServerSettings
from support.fake_backend import FakeBackend

TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {"a": {}}}}
CALL = 'Well.<tool_call>{"name": "weather", "arguments": {"a": 1}}</tool_call>'
EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def ask(backend: FakeBackend | None = None, **body: Any) -> Any:
    settings = ServerSettings(tool_call_parser="hermes")
    app = openai_app(backend or FakeBackend(), settings)
    return TestClient(app, raise_server_exceptions=False).post("/v1/responses", json={"input": "hi", **body})


def events_of(text: str) -> list[Any]:
    found = []
    for i, part in enumerate(text.split("\n\n")[:-1]):
        name, data = part.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert (name, event["sequence_number"]) == (f"event: {event['type']}", i)
        EVENTS.validate_python(event)
        found.append(event)
    return found


def without_ids(response: dict[str, Any]) -> dict[str, Any]:
    """Return the response without ids and times, so that two answers to one request are equal."""
    items = [{**item, "id": "", "call_id": ""} for item in response["output"]]
    return {**response, "id": "", "created_at": 0, "output": items}


def test_an_answer_has_the_form_of_openai() -> None:
    backend = FakeBackend()
    answer = Response.model_validate(
        ask(backend, instructions="be short", max_output_tokens=9, top_k=3, metadata={"a": "b"}).json()
    )
    assert (answer.output_text, answer.status, answer.metadata) == ("Hello, wörld 🐟", "completed", {"a": "b"})
    assert answer.usage is not None
    assert answer.usage.input_tokens_details.cached_tokens == 3
    job = backend.streams[0].job
    assert (job.params.max_tokens, job.params.top_k) == (9, 3)
    assert job.prompt is not None
    assert "<|system|>be short<|end|><|user|>hi<|end|>" in job.prompt


def test_an_answer_that_reaches_its_length_is_incomplete() -> None:
    answer = Response.model_validate(ask(FakeBackend(finish="length")).json())
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert events_of(ask(FakeBackend(finish="length"), stream=True).text)[-1]["type"] == "response.incomplete"


@pytest.mark.parametrize("says", ["Hello", CALL, ""])
@pytest.mark.parametrize("body", [{}, {"tools": [TOOL]}, {"include": ["message.output_text.logprobs"]}])
def test_a_stream_adds_up_to_the_answer(says: str, body: dict[str, Any]) -> None:
    pieces = [says[i : i + 3] for i in range(0, len(says), 3)] or [""]
    whole = ask(FakeBackend(lambda _: pieces), **body).json()
    Response.model_validate(whole)
    events = events_of(ask(FakeBackend(lambda _: pieces), **body, stream=True).text)
    assert [event["type"] for event in events[:3]] == [
        "response.created", "response.in_progress", "response.output_item.added",
    ]  # fmt: skip
    assert without_ids(events[-1]["response"]) == without_ids(whole)
    for i, item in enumerate(whole["output"]):
        mine = [event for event in events if event.get("output_index") == i]
        text = "".join(event["delta"] for event in mine if event["type"].endswith(".delta"))
        done = mine[-1]["item"]
        if item["type"] == "message":
            assert text == item["content"][0]["text"] == done["content"][0]["text"]
        else:
            assert json.loads(text) == json.loads(item["arguments"]) == {"a": 1}
    kinds = [item["type"] for item in whole["output"]]
    assert kinds == (["message", "function_call"] if says == CALL and "tools" in body else ["message"])


@pytest.mark.parametrize("top", [None, 1])
def test_the_requested_number_of_likeliest_tokens_is_returned(top: int | None) -> None:
    answer = ask(FakeBackend(lambda _: ["hello"]), include=["message.output_text.logprobs"], top_logprobs=top).json()
    for each in answer["output"][0]["content"][0]["logprobs"]:
        assert (each["logprob"], [known["logprob"] for known in each["top_logprobs"]]) == (-1.5, [-0.5][: top or 0])


def test_a_conversation_with_a_call_reaches_the_template() -> None:
    template = (
        "{% for m in messages %}[{{ m.role }} {{ m.content }} {{ m.tool_calls | default('') | tojson }}]{% endfor %}"
    )
    backend = FakeBackend()
    settings = ServerSettings(chat_template=template)
    said = [
        {"role": "developer", "content": [{"type": "input_text", "text": "be kind"}]},
        {"role": "user", "content": "hi"},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'},
        {"type": "function_call_output", "call_id": "c1", "output": "done"},
    ]
    answer = TestClient(openai_app(backend, settings)).post("/v1/responses", json={"input": said})
    assert answer.status_code == 200, answer.text
    prompt = backend.streams[0].job.prompt or ""
    assert "[system be kind" in prompt
    assert '"arguments": {"a": 1}' in prompt
    assert "[tool done" in prompt


def test_text_and_calls_of_one_turn_become_one_message() -> None:
    template = "{% for m in messages %}[{{ m.role }} {{ m.content }} {{ m.tool_calls | length }}]{% endfor %}"
    backend = FakeBackend()
    said = [
        {"role": "user", "content": "hi"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "let me see"}]},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "done"},
    ]
    client = TestClient(openai_app(backend, ServerSettings(chat_template=template)))
    answer = client.post("/v1/responses", json={"input": said, "tool_choice": "auto"})
    assert answer.status_code == 200, answer.text
    assert backend.streams[0].job.prompt == "[user hi 0][assistant let me see 2][tool done 0]"


def test_tools_do_not_change_log_probabilities() -> None:
    tools = [{"type": "function", "name": "f", "parameters": {"type": "object"}}]
    include = ["message.output_text.logprobs"]
    found = []
    for more in ({}, {"tools": tools}):
        app = openai_app(FakeBackend(), ServerSettings(tool_call_parser="hermes"))
        answer = TestClient(app).post("/v1/responses", json={"input": "hi", "include": include, **more})
        assert answer.status_code == 200, answer.text
        found.append(answer.json()["output"][0]["content"][0]["logprobs"])
    assert found[0] == found[1] != []


def test_a_text_format_reaches_the_engine_as_structured_outputs() -> None:
    backend = FakeBackend()
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert ask(backend, text={"format": {"type": "json_schema", "name": "x", "schema": schema}}).status_code == 200
    wanted = backend.streams[0].job.params.structured_outputs
    assert wanted is not None
    assert wanted.json == schema


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"input": 5}, 400, "input"),
        ({"input": []}, 400, "input"),
        ({"input": [{"type": "reasoning"}]}, 400, "input"),
        ({"input": [{"type": "reasoning", "summary": [5]}]}, 400, "input[0].summary"),
        ({"input": [{"type": "web_search_call"}]}, 400, "input[0]"),
        ({"input": [{"type": "item_reference", "id": "msg_x"}]}, 404, "input[0]"),
        ({"input": [{"type": "item_reference"}]}, 404, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, 400, "input[0].content[0]"),
        ({"input": [{"content": "x"}]}, 400, "input[0].role"),
        ({"input": [{"role": "user"}]}, 400, "input"),
        ({"max_output_tokens": 0}, 400, "max_output_tokens"),
        ({"min_tokens": 9, "max_output_tokens": 2}, 400, "min_tokens"),
        ({"previous_response_id": "x"}, 404, "previous_response_id"),
        ({"background": True}, 400, "background"),
        ({"conversation": "conv_x"}, 400, "conversation"),
        ({"prompt": {"id": "x"}}, 400, "prompt"),
        ({"reasoning": {"effort": 5}}, 400, "reasoning"),
        ({"reasoning": "high"}, 400, "reasoning"),
        ({"n": 2}, 400, "n"),
        ({"truncation": "auto"}, 400, "truncation"),
        ({"include": ["file_search_call.results"]}, 400, "include"),
        ({"tools": [{"type": "web_search"}]}, 400, "tools[0]"),
        ({"text": {"format": {"type": "json_schema", "schema": {"type": "x"}}}}, 422, "text.format"),
        ({"text": {"format": {"type": "yaml"}}}, 400, "text.format.type"),
        ({"model": "x"}, 404, "model"),
    ],
)
def test_errors_name_the_field(body: dict[str, Any], status: int, param: str) -> None:
    answer = ask(**body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text


@pytest.mark.parametrize("stream", [False, True])
def test_failures_have_a_status_or_end_the_stream(stream: bool) -> None:
    full = ask(FakeBackend(error=QueueFull("full", 2)), stream=stream)
    assert (full.status_code, full.headers["retry-after"]) == (429, "2")
    late = ask(FakeBackend(error=EngineError("rank 1 has died"), fail_after=1), stream=stream)
    if stream:
        last = events_of(late.text)[-1]
        assert (last["type"], last["response"]["error"]["message"]) == ("response.failed", "rank 1 has died")
    else:
        assert late.status_code == 500
