"""Hundreds of generated requests: none gives a server error, and a good request is answered afterwards.

Valid and invalid requests come from the server's OpenAPI description (schemathesis), and any JSON from hypothesis.
"""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.checks import (
    content_type_conformance,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)

from support.servers import ShoalServer

pytestmark = pytest.mark.slow

GOOD: Any = {"prompt": "Count:", "max_tokens": 4, "temperature": 0}
CHECKS: list[Any] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
WITH_BODY = 20  # generated requests for an operation with a body, in each mode
WITHOUT = 5
GARBAGE = 100
WAIT_S = 100.0
# Fields with which a request may take long, and the values to which they are cut. Larger values are tested elsewhere.
MOST = {"max_tokens": 4, "max_completion_tokens": 4, "max_output_tokens": 4, "n": 3, "replicas": 1} | dict.fromkeys(
    ("logprobs", "top_logprobs", "prompt_logprobs"), 5
)
DEFAULTS = {
    "/v1/completions": "max_tokens",
    "/v1/chat/completions": "max_tokens",
    "/v1/responses": "max_output_tokens",
}

FIELDS = """model prompt messages max_tokens max_completion_tokens n best_of temperature top_p top_k min_p stream
stream_options stop stop_token_ids bad_words logprobs top_logprobs prompt_logprobs echo logit_bias
allowed_token_ids seed priority data_parallel_rank response_format structured_outputs guided_json guided_regex
guided_choice guided_grammar tools tool_choice chat_template_kwargs add_generation_prompt continue_final_message
ignore_eos min_tokens user input instructions text include tokens presence_penalty frequency_penalty
repetition_penalty skip_special_tokens detokenize replicas"""
UNKNOWABLE = ("model", "data_parallel_rank", "best_of", "chat_template_kwargs")

fuzzed = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)

OPERATIONS = {"/pause", "/resume", "/sleep", "/wake_up", "/reset_prefix_cache"}  # they take parameters in the query

WITHOUT_PARAMETERS = {"/resume", "/start_profile", "/stop_profile"}  # they take no parameters


@pytest.fixture(scope="module")
def server() -> Iterator[ShoalServer]:
    with ShoalServer("--kv-cache-memory-bytes", "64MiB") as running:
        yield running


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    with requests.Session() as found:
        yield found


def check_well(server: ShoalServer, session: requests.Session) -> None:
    answer = session.post(f"{server.url}/v1/completions", json=GOOD, timeout=WAIT_S)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 4


def known(case: Case[Any]) -> Any:
    """Return the body without undescribed fields and without fields whose valid values no schema tells."""
    if not isinstance(case.body, dict):
        return case.body
    return {name: value for name, value in case.body.items() if name in FIELDS.split() and name not in UNKNOWABLE}


def shortened(path: str, body: Any) -> Any:
    """Return the body with limits on the work that the server may have with it."""
    if not isinstance(body, dict):
        return body
    found = {**body}
    if path in DEFAULTS:
        found.setdefault(DEFAULTS[path], 4)
    for name, most in MOST.items():
        if isinstance(found.get(name), int) and not isinstance(found[name], bool) and found[name] > most:
            found[name] = most
    return found


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_requests_from_the_openapi_description_get_described_answers(
    server: ShoalServer, session: requests.Session, mode: GenerationMode
) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    statuses: Counter[int] = Counter()
    for result in schema.get_all_operations():
        operation: Any = cast(Any, result).ok()
        if mode is GenerationMode.NEGATIVE and (operation.method == "get" or operation.path in WITHOUT_PARAMETERS):
            continue  # no parameter that could be wrong
        with_body = operation.method == "post" and operation.path not in OPERATIONS

        @settings(fuzzed, max_examples=WITH_BODY if with_body else WITHOUT)
        @given(operation.as_strategy(generation_mode=mode))
        def ask(case: Case[Any]) -> None:
            if mode is GenerationMode.POSITIVE:
                case.body = known(case)
                case.headers.pop("X-data-parallel-rank", None)
            case.body = shortened(case.path, case.body)
            response = case.call(session=session, timeout=WAIT_S)
            statuses[response.status_code] += 1
            case.validate_response(response, checks=CHECKS)
            if case.path in OPERATIONS:  # the next requests need a server that computes
                assert session.post(f"{server.url}/wake_up", timeout=WAIT_S).status_code == 200

        ask()
    check_well(server, session)
    assert statuses.total() >= 150, statuses
    assert statuses[200 if mode is GenerationMode.POSITIVE else 400] >= 25, statuses


words = st.text(max_size=12) | st.sampled_from(
    ["auto", "none", "user", "json_schema", "function", "text", "\ud800", ""]
)
numbers = st.integers() | st.floats() | st.sampled_from([0, -1, 1 << 31, 1 << 63, 10**30, 1e308])
values = st.recursive(
    st.none() | st.booleans() | numbers | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
    max_leaves=12,
)
fields = st.sampled_from(FIELDS.split())
paths = st.sampled_from(["/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize"])
parts = st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "assistant", "tool"]), "content": words})
whole = st.fixed_dictionaries(
    {
        "prompt": words,
        "messages": st.lists(parts, min_size=1, max_size=3),
        "input": words,
        "tokens": st.lists(st.integers(0, 639), max_size=5),
    }
)


def needed(path: str, body: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """Return the required fields of `body` for a path, so that the other fields are read too, and `extra`."""
    name = {"/v1/chat/completions": "messages", "/v1/responses": "input", "/detokenize": "tokens"}.get(path, "prompt")
    found: dict[str, Any] = shortened(path, {name: body[name], **extra})
    return found


@pytest.mark.timeout(600)
def test_json_of_any_kind_is_answered_or_refused(server: ShoalServer, session: requests.Session) -> None:
    @settings(fuzzed, max_examples=GARBAGE)
    @given(paths, whole, st.dictionaries(fields, values, max_size=3))
    def ask(path: str, body: dict[str, Any], extra: dict[str, Any]) -> None:
        statuses[send(server, session, path, json.dumps(needed(path, body, extra)).encode())] += 1

    statuses: Counter[int] = Counter()
    ask()
    assert statuses.total() >= GARBAGE
    assert statuses[200] >= GARBAGE / 10, statuses
    check_well(server, session)


@pytest.mark.timeout(600)
def test_bytes_of_any_kind_are_answered_or_refused(server: ShoalServer, session: requests.Session) -> None:
    @settings(fuzzed, max_examples=GARBAGE)
    @given(
        paths,
        st.binary(max_size=100) | values.map(json.dumps).map(str.encode),
        st.sampled_from(
            ["application/json", "text/plain", "application/json; charset=utf-16", "multipart/form-data", ""]
        ),
    )
    def ask(path: str, body: bytes, kind: str) -> None:
        statuses[send(server, session, path, body, kind)] += 1

    statuses: Counter[int] = Counter()
    ask()
    assert statuses.total() >= GARBAGE
    check_well(server, session)


def send(server: ShoalServer, session: requests.Session, path: str, body: bytes, kind: str = "application/json") -> int:
    answer = session.post(server.url + path, data=body, headers={"Content-Type": kind}, timeout=WAIT_S)
    assert answer.status_code < 500, (body, answer.text)
    assert "Traceback" not in answer.text
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]
    return answer.status_code
