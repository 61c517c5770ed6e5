"""Numbers outside JSON or outside 64-bit floats are refused in every field of every endpoint, never with status 500.

The fields come from the server's OpenAPI description, so new endpoints are tested as well.
"""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from shoal.server.app import openai_app
from shoal.server.http.limits import add_limits
from shoal.server.operations import scaling
from shoal.server.settings import ServerSettings
from support.fake_backend import FakeBackend

NO_NUMBERS = ["1e999", "-1e999", "NaN", "Infinity", "-Infinity", "1E+400", "9" * 400 + ".0"]
ODD = [*NO_NUMBERS, "9" * 400, "9" * 5000, "-" + "9" * 30, "1.7e308", "1e-999", "[" * 100 + "]" * 100]
TOOL = {"type": "function", "name": "f", "function": {"name": "f"}}
# The required fields of each path, without which the others would not be read; tools, so that tool_choice is read too.
NEEDED: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "tools": [TOOL]},
    "/v1/responses": {"input": "x", "tools": [TOOL]},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [1]},
}
INSIDE = ["%s", '[{"a":%s}]', '{"type":"function","name":"f","function":{"name":"f"},"a":[%s]}']


def app() -> FastAPI:
    backend = FakeBackend(refusal=AssertionError("no body in this test has a valid number of replicas"))
    found = openai_app(backend, ServerSettings(tool_call_parser="hermes"))
    found.include_router(scaling.routes(backend))
    add_limits(found, ServerSettings())
    return found


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(app(), raise_server_exceptions=False) as found:
        yield found


def fields() -> list[tuple[str, str]]:
    """Return (path, field) for every described field, and for one unknown field of each path."""
    described = app().openapi()
    found = []
    for path, operations in described["paths"].items():
        body = operations.get("post", {}).get("requestBody")
        if body is not None:
            name = body["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
            found += [(path, field) for field in [*described["components"]["schemas"][name]["properties"], "unknown"]]
    return found


def post(client: TestClient, path: str, field: str, value: str, stream: bool = False) -> Any:
    body = NEEDED.get(path, {}) | ({"stream": True} if stream else {})
    others = "".join(f"{json.dumps(name)}:{json.dumps(each)}," for name, each in body.items() if name != field)
    data = f"{{{others}{json.dumps(field)}:{value}}}".encode()
    answer = client.post(path, content=data, headers={"content-type": "application/json"})
    assert answer.status_code < 500, (path, data[:300], answer.text[:500])
    if answer.status_code == 200 and not stream:
        json.loads(answer.text, parse_constant=lambda name: pytest.fail(f"{name} in the answer to {data[:300]!r}"))
    return answer


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted({path for path, _ in fields()}))
def test_odd_numbers_are_refused_in_every_field(client: TestClient, path: str) -> None:
    """Every field gets every value, and meets every form; every value meets every form too."""
    for row, field in enumerate(field for at, field in fields() if at == path):
        for column, value in enumerate(ODD):
            answer = post(client, path, field, INSIDE[(row + column) % len(INSIDE)] % value)
            if value in NO_NUMBERS:
                assert answer.status_code == 400, (field, value)
                assert answer.json()["error"]["message"], (field, value)


@pytest.mark.parametrize("stream", [False, True])
def test_odd_numbers_are_refused_in_a_tool(client: TestClient, stream: bool) -> None:
    value = '{"type":"function","name":"f","x":1e999}'
    answer = post(client, "/v1/responses", "tool_choice", value, stream)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")
    assert "'1e999'" in answer.json()["error"]["message"]


def test_odd_numbers_within_a_text_are_accepted(client: TestClient) -> None:
    assert post(client, "/v1/completions", "prompt", '"NaN, \\"Infinity\\" and 1e999"').status_code == 200


scalars = st.sampled_from([*ODD, "null", "true", "0", "-1", "1e2", '""', '"auto"', '"f"', '"function"', '"\\ud800"'])
texts = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda parts: f"[{','.join(parts)}]")
        | st.dictionaries(
            st.sampled_from(
                ["type", "name", "function", "parameters", "format", "schema", "json_schema", "content", "1"]
            ),
            inner,
            max_size=4,
        ).map(lambda parts: "{" + ",".join(f'"{name}":{part}' for name, part in parts.items()) + "}")
    ),
    max_leaves=8,
)


@pytest.mark.slow
@settings(max_examples=200, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(fields()), texts, st.booleans())
def test_odd_values_never_give_a_server_error(
    client: TestClient, field: tuple[str, str], value: str, stream: bool
) -> None:
    post(client, *field, value, stream)
