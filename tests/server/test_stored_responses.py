"""Stored responses: the store, its endpoints, and OpenAI's client with two API servers."""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from openai.types.responses import Response, ResponseItem
from pydantic import TypeAdapter
from starlette.testclient import TestClient

import openai
from shoal.errors import EngineError
from shoal.server.api.responses.response_store import ResponseStore
from shoal.server.app import openai_app
from shoal.server.settings import ServerSettings
from shoal.wire.base import encode
from shoal.wire.fleet import ResponseNames, StoredTurn, StoreResponse, stored_turns_decoder
from support.fake_backend import FakeBackend
from support.servers import ShoalServer

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }} {{ m.content }}"
    "{% if m.reasoning_content %} thought {{ m.reasoning_content }}{% endif %}"
    "{% for c in m.tool_calls or [] %} {{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}]"
    "{% endfor %}"
)
CALL = '<tool_call>{"name": "weather", "arguments": {"a": 1}}</tool_call>'
TOOL: Any = {"type": "function", "name": "weather", "parameters": {"type": "object"}}
ITEM: TypeAdapter[Any] = TypeAdapter(ResponseItem)


class Talk:
    """A conversation with a server. `shown` is the last prompt that the model got."""

    def __init__(self, says: list[str] | None = None, **settings: Any) -> None:
        self.says = says or ["Fine."]
        self.backend = FakeBackend(lambda _: self.says)
        found = ServerSettings(chat_template=TEMPLATE, tool_call_parser="hermes", **settings)
        self.backend.store = ResponseStore.of(found)
        self.http = TestClient(openai_app(self.backend, found), raise_server_exceptions=False)

    def say(self, given: Any, **more: Any) -> Any:
        answer = self.http.post("/v1/responses", json={"input": given, **more})
        if not more.get("stream"):
            return answer.json()
        events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        return events[-1]["response"]

    @property
    def shown(self) -> str:
        return self.backend.streams[-1].job.prompt or ""


@pytest.mark.parametrize("stream", [False, True])
def test_a_second_turn_continues_the_conversation(stream: bool) -> None:
    talk = Talk()
    first = talk.say("Hi", instructions="be short", stream=stream)
    assert (first["store"], first["previous_response_id"]) == (True, None)
    second = talk.say("And you?", previous_response_id=first["id"], stream=stream)
    assert second["previous_response_id"] == first["id"]
    assert talk.shown == "[user Hi][assistant Fine.][user And you?]"
    talk.say("Hm", previous_response_id=second["id"], instructions="be kind")
    assert talk.shown == "[system be kind][user Hi][assistant Fine.][user And you?][assistant Fine.][user Hm]"
    talk.say("No?", previous_response_id=first["id"])
    assert talk.shown == "[user Hi][assistant Fine.][user No?]"


@pytest.mark.parametrize("stream", [False, True])
def test_the_output_of_a_call_follows_the_call(stream: bool) -> None:
    talk = Talk([CALL[i : i + 5] for i in range(0, len(CALL), 5)])
    first = talk.say("Rain?", tools=[TOOL], stream=stream)
    (call,) = first["output"]
    talk.says = ["It rains."]
    done = {"type": "function_call_output", "call_id": call["call_id"], "output": "wet"}
    talk.say([done], previous_response_id=first["id"], tools=[TOOL], stream=stream)
    assert talk.shown == '[user Rain?][assistant  weather{"a": 1}][tool wet]'
    talk.say([{"type": "item_reference", "id": call["id"]}, done], tools=[TOOL])
    assert talk.shown == '[assistant  weather{"a": 1}][tool wet]'


def test_item_references_lead_to_items_of_this_and_earlier_requests() -> None:
    talk = Talk()
    first = talk.say([{"type": "message", "id": "msg_mine", "role": "user", "content": "Hi"}])
    talk.say([{"type": "item_reference", "id": name} for name in ("msg_mine", first["output"][0]["id"])])
    assert talk.shown == "[user Hi][assistant Fine.]"
    twice = [{"type": "message", "id": "a", "role": "user", "content": "Ho"}, {"type": "item_reference", "id": "a"}]
    talk.say(twice)
    assert talk.shown == "[user Ho][user Ho]"


def test_an_id_with_half_a_surrogate_pair_is_unknown() -> None:
    talk = Talk()
    for body, field in (
        (r'{"input": "x", "previous_response_id": "\ud800"}', "previous_response_id"),
        (r'{"input": [{"type": "item_reference", "id": "\ud800"}]}', "input[0].id"),
        (r'{"input": [{"role": "user", "content": "x", "id": "\ud800"}]}', "input[0].id"),
    ):
        answer = talk.http.post("/v1/responses", content=body, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field), answer.text


def test_reasoning_items_reach_the_template() -> None:
    talk = Talk()
    thought = {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "hm"}]}
    whole = {**thought, "content": [{"type": "reasoning_text", "text": "hmm"}], "encrypted_content": "x"}
    said = {"role": "assistant", "content": "Yes"}
    answer = talk.say([{"role": "user", "content": "Hi"}, thought, said, whole, {"role": "user", "content": "So"}])
    assert talk.shown == "[user Hi][assistant Yes thought hm][user So]"
    talk.say("?", previous_response_id=answer["id"])
    assert talk.shown == "[user Hi][assistant Yes thought hm][user So][assistant Fine.][user ?]"
    talk.say([{"role": "user", "content": "Hi"}, whole, said], include=["reasoning.encrypted_content"])
    assert talk.shown == "[user Hi][assistant Yes thought hmm]"


def test_the_reasoning_effort_reaches_the_template() -> None:
    backend = FakeBackend()
    settings = ServerSettings(chat_template="{{ reasoning_effort }}: {{ messages[0].content }}")
    client = TestClient(openai_app(backend, settings))
    answer = client.post("/v1/responses", json={"input": "Hi", "reasoning": {"effort": "low", "summary": "auto"}})
    assert backend.streams[0].job.prompt == "low: Hi"
    reasoning = Response.model_validate(answer.json()).reasoning
    assert reasoning is not None
    assert reasoning.effort == "low"


def test_store_false_stores_nothing() -> None:
    for talk, more in (
        (Talk(), {"store": False}),
        (Talk(stored_responses=0), {}),
        (Talk(stored_response_bytes=100), {}),
    ):
        answer = talk.say("Hi", **more)
        assert answer["store"] is False
        assert talk.http.get(f"/v1/responses/{answer['id']}").status_code == 404
        refused = talk.http.post("/v1/responses", json={"input": "x", "previous_response_id": answer["id"]})
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "previous_response_not_found")
        assert "send the whole conversation as input" in refused.json()["error"]["message"]


def test_a_conversation_that_is_too_large_is_answered_and_not_stored() -> None:
    talk = Talk()
    junk = {"role": "user", "content": "Hi", "junk": "x" * (9 << 20)}
    answer = talk.say([junk])
    assert (answer["status"], answer["store"], talk.backend.store.size) == ("completed", False, 0)


def test_requests_succeed_though_the_store_does_not_answer() -> None:
    talk = Talk()

    async def ask(verb: str, payload: bytes = b"", *, patient: bool = False) -> bytes:
        raise EngineError("the engine does not answer")

    talk.backend.ask = ask  # type: ignore[method-assign]
    answer = talk.say("Hi")
    assert (answer["status"], answer["store"]) == ("completed", False)


def test_the_previous_response_may_be_removed_while_an_answer_is_made() -> None:
    talk = Talk()
    first = talk.say("Hi")
    ask = talk.backend.ask

    async def forgetful(verb: str, payload: bytes = b"", *, patient: bool = False) -> bytes:
        if verb == "responses.keep" and talk.backend.store.size:
            await ask("responses.drop", first["id"].encode())
        return await ask(verb, payload)

    talk.backend.ask = forgetful  # type: ignore[method-assign]
    second = talk.say("Ho", previous_response_id=first["id"])
    assert second["store"] is True
    talk.say("Hm", previous_response_id=second["id"])
    assert talk.shown == "[user Hi][assistant Fine.][user Ho][assistant Fine.][user Hm]"


# --- the endpoints -------------------------------------------------------------------------------------------------


def test_a_response_is_returned_listed_and_deleted() -> None:
    talk = Talk()
    first = talk.say("Hi", metadata={"a": "b"})
    second = talk.say(
        [{"role": "assistant", "content": "Ah"}, {"role": "user", "content": "Ho"}], previous_response_id=first["id"]
    )
    path = f"/v1/responses/{second['id']}"
    assert talk.http.get(path).json() == second
    Response.model_validate(talk.http.get(f"/v1/responses/{first['id']}").json())
    listed = talk.http.get(f"{path}/input_items", params={"order": "asc"}).json()
    for item in listed["data"]:
        ITEM.validate_python(item)
    assert [item["content"][0]["text"] for item in listed["data"]] == ["Hi", "Fine.", "Ah", "Ho"]
    assert (listed["has_more"], listed["first_id"]) == (False, listed["data"][0]["id"])
    newest = talk.http.get(f"{path}/input_items", params={"limit": 1}).json()
    assert (newest["data"], newest["has_more"]) == (listed["data"][-1:], True)
    rest = talk.http.get(f"{path}/input_items", params={"after": newest["last_id"]}).json()
    assert (rest["data"], rest["has_more"]) == (listed["data"][-2::-1], False)
    assert talk.http.delete(f"/v1/responses/{first['id']}").json() == {
        "id": first["id"], "object": "response", "deleted": True,
    }  # fmt: skip
    assert talk.http.get(f"/v1/responses/{first['id']}").status_code == 404
    talk.say("Hm", previous_response_id=second["id"])
    assert talk.shown.startswith("[user Hi][assistant Fine.][assistant Ah]")


@pytest.mark.parametrize(
    ("method", "path", "status", "param"),
    [
        ("GET", "resp_x", 404, "response_id"),
        ("DELETE", "resp_x", 404, "response_id"),
        ("GET", "resp_x/input_items", 404, "response_id"),
        ("POST", "resp_x/cancel", 404, "response_id"),
        ("POST", "{}/cancel", 400, "response_id"),
        ("GET", "{}?stream=true", 400, "stream"),
        ("GET", "{}/input_items?limit=0", 400, "limit"),
        ("GET", "{}/input_items?after=x", 400, "after"),
        ("GET", "x" * 300, 400, "response_id"),
    ],
)
def test_errors_name_the_parameter(method: str, path: str, status: int, param: str) -> None:
    talk = Talk()
    name = talk.say("Hi")["id"]
    answer = talk.http.request(method, f"/v1/responses/{path.format(name)}")
    error = answer.json()["error"]
    assert (answer.status_code, param in str(error)) == (status, True), answer.text


# --- the store -----------------------------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def store(**limits: Any) -> ResponseStore:
    return ResponseStore(**{"most": 3, "most_bytes": 1 << 20, "seconds": 10.0, "clock": Clock(), **limits})


def keep(found: ResponseStore, name: str, previous: str | None = None, size: int = 10) -> bytes:
    turn = StoredTurn(b"[%s]" % (b"1" * size), (f"item of {name}",))
    asked = StoreResponse(name, b"{}", turn, StoredTurn(b"[2]", ()), previous)
    return found.verbs["responses.keep"](encode(asked))


def has(found: ResponseStore, name: str) -> bool:
    return bool(found.verbs["responses.read"](name.encode()))


def test_unused_responses_are_removed_after_a_time() -> None:
    clock = Clock()
    found = store(clock=clock)
    keep(found, "a")
    keep(found, "b")
    clock.now = 9.0
    assert has(found, "a")
    clock.now = 15.0
    assert (has(found, "a"), has(found, "b")) == (True, False)
    clock.now = 30.0
    assert not has(found, "a")
    assert found.size == 0


def test_the_least_recently_used_response_is_removed_first() -> None:
    found = store()
    for name in "abc":
        keep(found, name)
    assert has(found, "a")
    keep(found, "d")
    assert [has(found, name) for name in "abcd"] == [True, False, True, True]


def test_the_bytes_of_a_store_have_a_limit_and_shared_turns_count_once() -> None:
    found = store(most=1000, most_bytes=100_000)
    assert keep(found, "0", size=40_000) == b"kept"
    for i in range(1, 30):
        assert keep(found, str(i), str(i - 1), size=10) == b"kept"
    assert found.size < 100_000
    assert has(found, "0")
    assert keep(found, "large", size=90_000) == b"kept"
    assert found.size <= 100_000
    assert not has(found, "0")
    assert keep(found, "too large", size=100_000) == b""
    for name in ["large", *map(str, range(30))]:
        found.verbs["responses.drop"](name.encode())
    assert found.size == 0
    assert (
        stored_turns_decoder.decode(found.verbs["responses.items"](encode(ResponseNames(("item of 0",))))).turns == ()
    )


def test_a_conversation_stays_whole_when_its_earlier_responses_are_removed() -> None:
    found = store()
    keep(found, "a")
    keep(found, "b", "a")
    found.verbs["responses.drop"](b"a")
    assert len(stored_turns_decoder.decode(found.verbs["responses.turns"](b"b")).turns) == 4
    items = found.verbs["responses.items"](encode(ResponseNames(("item of a", "item of a", "?"))))
    assert len(stored_turns_decoder.decode(items).turns) == 1
    assert keep(found, "c", "a") == b"lost"


def test_a_response_with_a_known_id_replaces_the_older_one() -> None:
    found = store()
    keep(found, "a", size=10)
    keep(found, "a", size=20)
    assert stored_turns_decoder.decode(found.verbs["responses.turns"](b"a")).turns[0] == b"[%s]" % (b"1" * 20)


# --- OpenAI's client with several API servers ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def client_of() -> Iterator[Callable[[], openai.OpenAI]]:
    """Return a maker of clients. Each has connections of its own, which any API server may accept."""
    options = ["--kv-cache-memory-bytes", "64MiB", "--api-server-count", "2", "--chat-template", TEMPLATE]
    with ShoalServer(*options) as server, contextlib.ExitStack() as opened:

        def client() -> openai.OpenAI:
            return opened.enter_context(openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0))

        yield client


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_openais_client_reads_continues_and_deletes_responses(client_of: Callable[[], openai.OpenAI]) -> None:
    options: Any = {"model": "bundled", "max_output_tokens": 8, "temperature": 0}
    first = client_of().responses.create(input="Count from 3 to 9:", **options)
    said: list[Any] = [
        {"role": "user", "content": "Count from 3 to 9:"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And on:"},
    ]
    expected = client_of().responses.create(input=said, store=False, **options)
    for _ in range(6):  # most likely, each API server accepts at least one
        client = client_of()
        second = client.responses.create(input="And on:", previous_response_id=first.id, **options)
        assert second.output_text == expected.output_text
        assert second.usage is not None
        assert expected.usage is not None
        assert second.usage.input_tokens == expected.usage.input_tokens
        asked = {"input": "And on:", "previous_response_id": first.id, "stream": True, **options}
        final = list(client_of().responses.create(**asked))[-1].response
        assert final.output_text == expected.output_text
        assert client_of().responses.retrieve(final.id).output_text == expected.output_text
        items = client_of().responses.input_items.list(final.id, order="asc").data
        assert [item.type for item in items] == ["message"] * 3
        client_of().responses.delete(final.id)
        with pytest.raises(openai.NotFoundError, match="send the whole conversation as input"):
            client_of().responses.create(input="x", previous_response_id=final.id, **options)
    with pytest.raises(openai.NotFoundError):
        client_of().responses.retrieve(expected.id)
    with pytest.raises(openai.BadRequestError, match="has ended"):
        client_of().responses.cancel(first.id)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("stream", [False, True])
def test_openais_client_continues_after_a_call(client_of: Callable[[], openai.OpenAI], stream: bool) -> None:
    parameters = {
        "type": "object",
        "properties": {"a": {"enum": [1]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    tool = {**TOOL, "parameters": parameters}
    options: Any = {"model": "bundled", "tools": [tool], "temperature": 0, "max_output_tokens": 300}
    options["parallel_tool_calls"] = False

    def create(**asked: Any) -> Any:
        if not stream:
            return client_of().responses.create(**asked, **options)
        return list(client_of().responses.create(**asked, **options, stream=True))[-1].response

    first = create(input="Weather?", tool_choice="required")
    (call,) = first.output
    assert (call.type, json.loads(call.arguments)) == ("function_call", {"a": 1})
    done = {"type": "function_call_output", "call_id": call.call_id, "output": "wet"}
    second = create(input=[done], previous_response_id=first.id, tool_choice="none")
    items = client_of().responses.input_items.list(second.id, order="asc").data
    assert [item.type for item in items] == ["message", "function_call", "function_call_output"]
