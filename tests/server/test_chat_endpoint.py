"""/v1/chat/completions with a fake engine. Answers are checked with the types of OpenAI's own client."""

import asyncio
import json
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from starlette.testclient import TestClient

from shoal.errors import ClosedError, EngineError, Overdue, QueueFull
from shoal.server.app import openai_app
from shoal.server.settings import ServerSettings
from support.fake_backend import FakeBackend

TALK = [{"role": "user", "content": "hi"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Ghent"}}</tool_call>'


def client(backend: FakeBackend | None = None, **settings: Any) -> TestClient:
    return TestClient(openai_app(backend or FakeBackend(), ServerSettings(**settings)), raise_server_exceptions=False)


def ask(backend: FakeBackend | None = None, settings: dict[str, Any] | None = None, **body: Any) -> Any:
    return client(backend, **(settings or {})).post("/v1/chat/completions", json={"messages": TALK, **body})


def chunks_of(text: str) -> list[Any]:
    assert text.endswith("data: [DONE]\n\n")
    return [json.loads(part.removeprefix("data: ")) for part in text.split("\n\n")[:-2]]


def added_up(chunks: list[Any]) -> dict[int, dict[str, Any]]:
    """Return the messages that a client makes of the chunks."""
    found: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk)
        for choice in chunk["choices"]:
            mine = found.setdefault(choice["index"], {"content": "", "calls": [], "finish": None, "logprobs": []})
            delta = choice["delta"]
            mine["content"] += delta.get("content") or ""
            mine["logprobs"] += (choice["logprobs"] or {"content": []})["content"]
            mine["finish"] = choice["finish_reason"] or mine["finish"]
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    mine["calls"].append([call["function"]["name"], ""])
                mine["calls"][call["index"]][1] += call["function"]["arguments"]
    return found


def test_an_answer_has_the_form_of_openai() -> None:
    body = ask(model="demo", temperature=0.5).json()
    answer = ChatCompletion.model_validate(body)
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason, answer.model) == ("Hello, wörld 🐟", "stop", "demo")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}


def test_a_stream_adds_up_to_the_answer() -> None:
    whole = ask(n=2, logprobs=True, top_logprobs=1).json()
    options = {"include_usage": True}
    chunks = chunks_of(ask(n=2, logprobs=True, top_logprobs=1, stream=True, stream_options=options).text)
    found = added_up(chunks)
    for choice in whole["choices"]:
        mine = found[choice["index"]]
        assert mine["content"] == choice["message"]["content"]
        assert mine["logprobs"] == choice["logprobs"]["content"]
        assert mine["finish"] == choice["finish_reason"] == "stop"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_each_chunk_has_the_usage_if_asked_for() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    used = [c["usage"]["completion_tokens"] for c in chunks_of(ask(stream=True, stream_options=options).text)]
    assert used == sorted(used)
    assert used[-1] > 0
    assert all("usage" not in chunk for chunk in chunks_of(ask(stream=True).text))
    only = {"continuous_usage_stats": True}
    assert all("usage" not in chunk for chunk in chunks_of(ask(stream=True, stream_options=only).text))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("top", [0, 1, 2])
def test_the_requested_number_of_likeliest_tokens_is_returned(top: int, stream: bool) -> None:
    """The chosen token is the second likeliest: it is listed among two, but not where only one is asked for."""
    answer = ask(FakeBackend(lambda _: ["hello"]), logprobs=True, top_logprobs=top, stream=stream)
    content = added_up(chunks_of(answer.text))[0]["logprobs"] if stream else None
    for each in content or answer.json()["choices"][0]["logprobs"]["content"]:
        assert [known["logprob"] for known in each["top_logprobs"]] == [-0.5, -1.5][:top]
        assert each["logprob"] == -1.5


@pytest.mark.parametrize(("body", "param"), [
    ({"stream": True, "prompt_logprobs": 0}, "prompt_logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
])  # fmt: skip
def test_fields_that_need_or_forbid_a_stream_are_refused_without_or_with_it(body: dict[str, Any], param: str) -> None:
    backend = FakeBackend()
    answer = ask(backend, **body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert not backend.streams
    assert ask(prompt_logprobs=0).json()["prompt_logprobs"][0] is None


@pytest.mark.parametrize("error", [None, RuntimeError("a secret")])
def test_every_answer_has_the_requests_id(error: Exception | None) -> None:
    post = client(FakeBackend(error=error)).post
    for path, body in [("/v1/chat/completions", {"messages": TALK}), ("/v1/chat/completions", {}), ("/nothing", {})]:
        answers = [post(path, json=body, headers=headers) for headers in ({}, {"X-Request-Id": "run-7/a"})]
        assert len(answers[0].headers["x-request-id"]) == 32
        assert answers[1].headers.get_list("x-request-id") == ["run-7/a"]
    assert client().post("/v1/chat/completions", json={"messages": TALK, "stream": True}).headers["x-request-id"]


@pytest.mark.parametrize("given", ["a b", "x" * 129, "<script>", ""])
def test_a_long_or_odd_request_id_is_replaced(given: str) -> None:
    answer = client().get("/v1/models", headers={"X-Request-Id": given})
    assert len(answer.headers["x-request-id"]) == 32


def test_parameters_reach_the_engine() -> None:
    backend = FakeBackend()
    body: dict[str, Any] = {
        "max_completion_tokens": 7, "top_k": 3.0, "min_p": 0.1, "seed": 5, "stop": ["x"], "logit_bias": {"5": 1},
        "min_tokens": 1, "ignore_eos": True, "priority": 4, "data_parallel_rank": 2,
    }  # fmt: skip
    assert ask(backend, **body).status_code == 200
    params = backend.streams[0].job.params
    assert (params.max_tokens, params.top_k, params.min_p, params.seed) == (7, 3, 0.1, 5)
    assert (params.stop, params.logit_bias, params.min_tokens, params.ignore_eos) == (("x",), {5: 1.0}, 1, True)
    assert backend.places == [(4, 2)]
    ask(backend)
    assert backend.streams[1].job.params.max_tokens is None


def test_a_header_chooses_the_replica() -> None:
    backend = FakeBackend()
    post = client(backend).post
    body = {"messages": TALK}
    assert post("/v1/chat/completions", json=body, headers={"X-data-parallel-rank": "3"}).status_code == 200
    refused = post("/v1/chat/completions", json=body, headers={"X-data-parallel-rank": "-1"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "X-data-parallel-rank")
    assert backend.places == [(0, 3)]


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"messages": []}, 400, "messages"),
        ({"messages": "hi"}, 400, "messages"),
        ({"messages": [{"role": "user"}]}, 400, "messages[0]"),
        ({"messages": [{"role": "user", "content": "a"}, {"content": "b"}]}, 400, "messages[1]"),
        ({"messages": [{"role": "ghost", "content": "a"}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]}, 400,
         "messages[0].content[1]"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "a" * 9000}]}, 400, "messages"),
        ({"model": "other"}, 404, "model"),
        ({"max_tokens": -1}, 400, "max_tokens"),
        ({"max_completion_tokens": 0}, 400, "max_completion_tokens"),
        ({"max_completion_tokens": 2, "min_tokens": 3}, 400, "min_tokens"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"temperature": -1}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"n": 2, "temperature": 0}, 400, "n"),
        ({"logprobs": 3}, 400, "logprobs"),
        ({"top_logprobs": 3}, 400, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
        ({"prompt_logprobs": -1}, 400, "prompt_logprobs"),
        ({"stop": [""]}, 400, "stop"),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, 400, "logit_bias"),
        ({"allowed_token_ids": [99999]}, 400, "allowed_token_ids"),
        ({"functions": [{}]}, 400, "functions"),
        ({"no_such_field": 1}, 400, "no_such_field"),
        ({"chat_template": "x"}, 400, "chat_template"),
        ({"chat_template_kwargs": {"messages": 1}}, 400, "chat_template_kwargs"),
        ({"response_format": {"type": "xml"}}, 400, "response_format.type"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}, 422,
         "response_format"),
        ({"structured_outputs": {"regex": "("}}, 422, "structured_outputs"),
        ({"structured_outputs": {}}, 400, "structured_outputs"),
        ({"structured_outputs": {"shape": 1}}, 400, "structured_outputs"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, 400, "guided_regex"),
        ({"guided_json": False}, 400, "guided_json"),
        ({"tools": "x"}, 400, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, 400, "tools[0].function.name"),
        ({"tools": [WEATHER]}, 400, "tool_choice"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, 400, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "required", "response_format": {"type": "json_object"}}, 400,
         "tool_choice"),
        ({"priority": 1 << 70}, 400, "priority"),
        ({"stream_options": {"include_usage": 3}}, 400, "stream_options.include_usage"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_errors_name_the_field(body: dict[str, Any], status: int, param: str, stream: bool) -> None:
    backend = FakeBackend()
    text = json.dumps({"messages": TALK, **body, "stream": stream})
    answer = client(backend).post("/v1/chat/completions", content=text, headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    assert not backend.streams


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "application/json"),
        (b"{", "application/json"),
        (b"[]", "application/json"),
        (b"\xff\xfe{}", "application/json"),
        (b'{"messages": ' + b"[" * 20_000, "application/json"),
        (b'{"seed": ' + b"1" * 5000 + b"}", "application/json"),
        (b'{"messages": []}', "text/plain"),
    ],
)
def test_invalid_bodies_are_refused(content: bytes, kind: str) -> None:
    answer = client().post("/v1/chat/completions", content=content, headers={"content-type": kind})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (QueueFull("4 requests wait", 2.5), 429, "rate_limit_error"),
        (Overdue("it waited 5 s", 5.0), 503, "server_error"),
        (ClosedError("the engine was closed"), 503, "server_error"),
        (EngineError("rank 1 has died"), 500, "server_error"),
        (RuntimeError("a secret"), 500, "server_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_failures_before_the_first_token_have_their_status(
    error: Exception, status: int, kind: str, stream: bool
) -> None:
    backend = FakeBackend(error=error)
    answer = ask(backend, stream=stream)
    assert (answer.status_code, answer.json()["error"]["type"]) == (status, kind)
    assert "secret" not in answer.text
    after = "10" if isinstance(error, ClosedError) else {429: "3", 503: "5"}.get(status)
    assert answer.headers.get("retry-after") == after
    assert all(stream.closed for stream in backend.streams)


def test_failures_after_the_first_token_end_the_stream() -> None:
    backend = FakeBackend(error=EngineError("rank 1 has died"), fail_after=2)
    answer = ask(backend, stream=True)
    assert answer.status_code == 200
    *_, last = chunks_of(answer.text)
    assert last["error"]["message"] == "rank 1 has died"
    assert all(stream.closed for stream in backend.streams)


def test_unknown_paths_and_methods_are_refused() -> None:
    missing = client().get("/v1/nothing")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    wrong = client().get("/v1/chat/completions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")


# --- tools ---------------------------------------------------------------------------------------------------------


def pieces(text: str, size: int = 3) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


@pytest.mark.parametrize(
    ("choice", "says", "finish"),
    [
        ("auto", "Let me see.\n" + CALL, "tool_calls"),
        ("required", '[{"name": "weather", "parameters": {"city": "Ghent"}}]', "tool_calls"),
        ({"type": "function", "function": {"name": "weather"}}, '{"city": "Ghent"}', "stop"),
    ],
)
def test_tool_calls_are_taken_from_the_output(choice: Any, says: str, finish: str) -> None:
    settings = {"tool_call_parser": "hermes"}
    body = {"tools": [WEATHER], "tool_choice": choice}
    answer = ChatCompletion.model_validate(ask(FakeBackend(lambda _: pieces(says)), settings, **body).json())
    message = answer.choices[0].message
    assert message.content == ("Let me see." if choice == "auto" else None)
    assert message.tool_calls is not None
    (call,) = message.tool_calls
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Ghent"})
    assert answer.choices[0].finish_reason == finish
    streamed = ask(FakeBackend(lambda _: pieces(says)), settings, **body, stream=True)
    found = added_up(chunks_of(streamed.text))[0]
    assert found["calls"] == [["weather", call.function.arguments]]
    assert (found["content"], found["finish"]) == (message.content or "", finish)


@pytest.mark.parametrize("stream", [False, True])
def test_a_required_call_that_is_cut_off_does_not_become_content(stream: bool) -> None:
    backend = FakeBackend(lambda _: pieces('[{"name": "weather", "parameters": {}}, {"name": "wea'), finish="length")
    answer = ask(backend, tools=[WEATHER], tool_choice="required", stream=stream)
    if stream:
        found = added_up(chunks_of(answer.text))[0]
        assert (found["calls"], found["content"], found["finish"]) == ([["weather", "{}"]], "", "length")
    else:
        (choice,) = answer.json()["choices"]
        assert (len(choice["message"]["tool_calls"]), choice["message"]["content"]) == (1, None)
        assert choice["finish_reason"] == "length"


@pytest.mark.parametrize(
    "fields",
    [
        {"modalities": ["text"], "include_reasoning": True, "spaces_between_special_tokens": True},
        {"reasoning_effort": "low"},
        {"tool_choice": "auto"},
        {"add_special_tokens": False, "store": False, "metadata": {"a": "b"}, "service_tier": "auto"},
    ],
)
def test_fields_that_ask_for_the_usual_behaviour_are_accepted(fields: dict[str, Any]) -> None:
    answer = ask(**fields)
    assert answer.status_code == 200, answer.text


def test_the_reasoning_effort_reaches_the_template() -> None:
    backend = FakeBackend()
    template = "{{ reasoning_effort | default('not said') }}"
    ask(backend, {"chat_template": template}, reasoning_effort="high")
    ask(backend, {"chat_template": template}, reasoning_effort="high", chat_template_kwargs={"reasoning_effort": "low"})
    ask(backend, {"chat_template": template})
    assert [stream.job.prompt for stream in backend.streams] == ["high", "low", "not said"]


def test_every_form_of_structured_outputs_reaches_the_engine() -> None:
    backend = FakeBackend()
    ask(backend, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False)
    ask(backend, tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "weather"}})
    ask(backend, tools=[WEATHER], tool_choice="none")
    ask(backend, {"tool_call_parser": "mistral"}, tools=[WEATHER])
    required, named, none, auto = [stream.job.params for stream in backend.streams]
    assert required.structured_outputs is not None
    assert isinstance(required.structured_outputs.json, dict)
    assert required.structured_outputs.json["maxItems"] == 1
    assert named.structured_outputs is not None
    assert named.structured_outputs.json == WEATHER["function"]["parameters"]  # type: ignore[index]
    assert (none.structured_outputs, auto.structured_outputs) == (None, None)
    assert (none.skip_special_tokens, auto.skip_special_tokens) == (True, False)


def test_references_in_tools_lead_to_the_definitions_of_the_same_tool() -> None:
    def tool(name: str, kind: str) -> dict[str, Any]:
        parameters = {
            "type": "object", "properties": {"x": {"$ref": "#/$defs/X"}}, "required": ["x"],
            "$defs": {"X": {"type": kind}}, "$id": f"http://example.com/{name}",
        }  # fmt: skip
        return {"type": "function", "function": {"name": name, "parameters": parameters}}

    backend = FakeBackend()
    answer = ask(backend, tools=[tool("a", "string"), tool("b", "integer")], tool_choice="required")
    assert answer.status_code == 200, answer.text
    grammar = backend.streams[0].job.grammar
    from llguidance import LLMatcher, LLTokenizer

    for text, right in [
        ('[{"name":"b","parameters":{"x":5}}]', True),
        ('[{"name":"b","parameters":{"x":"5"}}]', False),
    ]:
        matcher = LLMatcher(LLTokenizer("byte"), grammar)
        assert (matcher.try_consume_tokens(list(text.encode())) == len(text)) is right


# --- clients that disconnect ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_disconnects_ends_its_request(stream: bool) -> None:
    """Call the application directly: after the body, a disconnect comes while the answer is made."""

    async def main() -> None:
        backend = FakeBackend(gate=asyncio.Semaphore(1))
        app = openai_app(backend, ServerSettings())
        body = json.dumps({"messages": TALK, "stream": stream}).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        leave = asyncio.Event()
        sent: list[Any] = []

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await leave.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)
            if message["type"] == "http.response.body":
                leave.set()

        scope = {
            "type": "http", "method": "POST", "path": "/v1/chat/completions", "raw_path": b"", "query_string": b"",
            "root_path": "", "scheme": "http", "headers": [(b"content-type", b"application/json")],
            "asgi": {"version": "3.0"}, "http_version": "1.1", "server": ("x", 1), "client": ("x", 2),
        }  # fmt: skip
        running = asyncio.create_task(app(scope, receive, send))
        if not stream:
            while not backend.streams:
                await asyncio.sleep(0)
            leave.set()
        await asyncio.wait_for(running, 60)
        assert backend.streams[0].closed
        assert stream == any(b"assistant" in message.get("body", b"") for message in sent)

    asyncio.run(main())
