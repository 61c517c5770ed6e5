"""Keywords of JSON schemas that Shoal can't obey give a header or an error at every endpoint with schemas."""

from typing import Any

import pytest
from starlette.testclient import TestClient

from shoal.server.app import openai_app
from shoal.server.settings import ServerSettings
from support.fake_backend import FakeBackend

HEADER = "x-shoal-schema-ignored"
TAGS = {"type": "object", "properties": {"tags": {"type": "array", "items": {"type": "string"}, "uniqueItems": True}}}
IGNORED = "uniqueItems at #/properties/tags"
PLAIN = {"type": "object", "properties": {"tags": {"type": "array"}}}
TALK = [{"role": "user", "content": "hi"}]
CHOSEN = {"type": "function", "function": {"name": "f"}}


def tool(schema: dict[str, Any], strict: bool | None, name: str = "f") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": schema, "strict": strict}}


def completion(schema: dict[str, Any], strict: bool | None) -> tuple[str, dict[str, Any], str]:
    wanted = {"json": schema} if strict is None else {"json": schema, "strict": strict}
    return "/v1/completions", {"prompt": "x", "structured_outputs": wanted}, "structured_outputs"


def formatted(schema: dict[str, Any], strict: bool | None) -> tuple[str, dict[str, Any], str]:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": strict}}
    return "/v1/chat/completions", {"messages": TALK, "response_format": wanted}, "response_format"


def called(schema: dict[str, Any], strict: bool | None) -> tuple[str, dict[str, Any], str]:
    return "/v1/chat/completions", {"messages": TALK, "tools": [tool(schema, strict)], "tool_choice": CHOSEN}, "tools"


def responded(schema: dict[str, Any], strict: bool | None) -> tuple[str, dict[str, Any], str]:
    text = {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": strict}}
    return "/v1/responses", {"input": "x", "text": text}, "text.format"


def responded_call(schema: dict[str, Any], strict: bool | None) -> tuple[str, dict[str, Any], str]:
    tools = [{"type": "function", "name": "f", "parameters": schema, "strict": strict}]
    body = {"input": "x", "tools": tools, "tool_choice": {"type": "function", "name": "f"}}
    return "/v1/responses", body, "tools"


ENDPOINTS = [completion, formatted, called, responded, responded_call]


def ask(path: str, body: dict[str, Any], backend: FakeBackend | None = None) -> Any:
    app = openai_app(backend or FakeBackend(), ServerSettings())
    return TestClient(app, raise_server_exceptions=False).post(path, json=body)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("strict", [None, False])
@pytest.mark.parametrize("body_of", ENDPOINTS)
def test_a_header_names_the_ignored_keywords(body_of: Any, strict: bool | None, stream: bool) -> None:
    path, body, _ = body_of(TAGS, strict)
    answer = ask(path, {**body, "stream": stream})
    assert (answer.status_code, answer.headers[HEADER]) == (200, IGNORED)
    path, body, _ = body_of(PLAIN, strict)
    assert HEADER not in ask(path, {**body, "stream": stream}).headers


@pytest.mark.parametrize("body_of", ENDPOINTS)
def test_a_strict_schema_is_obeyed_or_refused(body_of: Any) -> None:
    path, body, param = body_of(TAGS, True)
    answer = ask(path, body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (422, param)
    assert IGNORED in error["message"]
    path, body, _ = body_of(PLAIN, True)
    assert ask(path, body).status_code == 200


def test_each_tool_may_be_strict_or_not() -> None:
    loose, strict = tool(TAGS, None, "loose"), tool(PLAIN, True, "strict")
    body = {"messages": TALK, "tools": [loose, strict], "tool_choice": "required"}
    answer = ask("/v1/chat/completions", body)
    assert (answer.status_code, answer.headers[HEADER]) == (200, "uniqueItems at #/$defs/loose/properties/tags")
    answer = ask("/v1/chat/completions", {**body, "tools": [loose, tool(TAGS, True, "strict")]})
    assert answer.status_code == 422
    assert "uniqueItems at #/$defs/strict/properties/tags" in answer.json()["error"]["message"]


@pytest.mark.parametrize(("body_of", "param"), [
    (completion, "structured_outputs"), (formatted, "response_format.json_schema.strict"),
    (called, "tools[0].function.strict"), (responded, "text.format.json_schema.strict"),
])  # fmt: skip
def test_strict_must_be_true_or_false(body_of: Any, param: str) -> None:
    path, body, _ = body_of(PLAIN, "yes")
    answer = ask(path, body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert "must be true or false" in answer.json()["error"]["message"]


def test_the_header_is_short_and_the_log_has_one_line(caplog: pytest.LogCaptureFixture) -> None:
    many = {"properties": {f"é{i}": TAGS for i in range(200)}}
    backend = FakeBackend()
    with caplog.at_level("WARNING", "shoal"):
        for _ in range(3):
            answer = ask("/v1/completions", {"prompt": ["x", "y"], "guided_json": many}, backend)
    assert answer.status_code == 200
    value = answer.headers[HEADER]
    assert value.isascii()
    assert len(value) <= 1000
    assert value.endswith(f", and {200 - value.count('uniqueItems')} more")
    assert [line for line in caplog.messages if "uniqueItems" in line] == caplog.messages[:1]


def test_an_anchor_leads_to_the_schema_of_its_own_tool() -> None:
    def anchored(kind: str) -> dict[str, Any]:
        return {
            "type": "object",
            "properties": {"x": {"$ref": "#item"}},
            "$defs": {"a": {"$anchor": "item", "type": kind}},
        }

    body = {"messages": TALK, "tool_choice": "required"}
    tools = [tool(anchored("string"), True, "f"), tool(anchored("integer"), True, "g")]
    assert ask("/v1/chat/completions", {**body, "tools": tools}).status_code == 200
