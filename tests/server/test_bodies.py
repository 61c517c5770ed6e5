"""Bodies are read like `json.loads` reads them, within limits, and in small steps."""

import json
import threading
from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from shoal.errors import RequestError
from shoal.server.api.body_reader import UnreadBodies, read_body, read_json
from shoal.server.api.request_schemas import CompletionBody
from shoal.server.app import make_app, openai_app
from shoal.server.http.errors import HttpError, http_error
from shoal.server.http.json_reader import JsonReader
from shoal.server.http.limits import RequestLimits
from shoal.server.settings import ServerSettings
from support.fake_backend import FakeBackend
from support.fakes import steady


def refused(body: bytes, **limits: int) -> int:
    with pytest.raises((HttpError, RequestError)) as caught:
        read_json(body, RequestLimits(**limits))
    return http_error(caught.value).status


def test_deep_json_is_refused() -> None:
    assert refused(b"[" * 10_000) == 400
    assert refused(b'{"a":' * 10_000 + b"1" + b"}" * 10_000) == 400
    read_json(b"[" * 128 + b"]" * 128)
    read_json(b"[" + b"[[],{}]," * 1000 + b"1]")
    read_json(json.dumps({"prompt": "[" * 1000 + '\\"{' * 1000}).encode())


def test_too_many_values_are_refused() -> None:
    """Values count even if many are read in one call; commas and brackets within texts do not count."""
    assert refused(b"[" + b"[]," * 100 + b"[]]", body_values=100) == 413
    assert refused(b"[" + b"1," * 100 + b"1]", body_values=100) == 413
    assert refused(b"{" + b",".join(b'"%d":1' % i for i in range(101)) + b"}", body_values=100) == 413
    read_json(b"[" + b"[]," * 49 + b"[]]", RequestLimits(body_values=100))
    read_json(b'{"a":"' + b"," * 1000 + b'","b":1}', RequestLimits(body_values=100))
    assert refused(b"[" + b"[]," * 100 + b"[]]", body_containers=100) == 413
    read_json(b"[" + b'"[{",' * 100 + b"[]]", RequestLimits(body_containers=100))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_only_utf8_is_read(encoding: str) -> None:
    assert refused(json.dumps({"prompt": "a"}).encode(encoding)) == 400
    assert refused(b'{"prompt":"\xff"}') == 400


texts = st.text(alphabet='[]{}"\\ab\n\u2222,: ', max_size=8)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-(10**9), 10**9).map(lambda n: n / 8) | texts,
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(texts, inner, max_size=6),
    max_leaves=30,
)


def with_json_loads(text: str) -> Any:
    """Return the value, or (message, position) of the mistake."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        return error.msg, error.pos


def with_our_reader(text: str) -> Any:
    try:
        return JsonReader(text, most_values=1000, most_containers=1000, most_depth=100).read()
    except json.JSONDecodeError as error:
        return error.msg, error.pos


@steady
@given(json_values, st.booleans(), st.sampled_from([None, 1, "\t"]))
def test_a_body_has_the_value_that_json_loads_gives(value: Any, ascii_: bool, indent: Any) -> None:
    text = json.dumps(value, ensure_ascii=ascii_, indent=indent)
    assert repr(with_our_reader(text)) == repr(json.loads(text))


@steady
@given(json_values, st.data())
def test_errors_have_the_position_that_json_loads_gives(value: Any, data: st.DataObject) -> None:
    text = json.dumps(value)
    at = data.draw(st.integers(0, len(text)))
    changed = text[:at] + data.draw(st.text(alphabet='[]{}",:1a \\\x00-', max_size=2)) + text[at + 1 :]
    assert repr(with_our_reader(changed)) == repr(with_json_loads(changed))


@pytest.mark.parametrize("end", ['"', '\\n"', '\n"', '\\"x"', ""])
@pytest.mark.parametrize("size", [0, 1, 1 << 16, (1 << 16) + 1, 3 << 16])
@pytest.mark.parametrize("form", ["{}", "[1,{},2]", '{{"a":1,"b":{},"c":[{}]}}', "{}x"])
def test_long_texts_are_read_like_short_ones(form: str, size: int, end: str) -> None:
    text = form.replace("{}", '"' + "é" * size + end).replace("{{", "{").replace("}}", "}")
    assert with_our_reader(text) == with_json_loads(text)


def test_lists_are_read_in_steps() -> None:
    """Another thread gets its turn long before the end."""
    text = "[" + "1234567," * 2_000_000 + "1]"
    turns = 0
    reading = threading.Event()
    over = threading.Event()

    def take_turns() -> None:
        nonlocal turns
        reading.wait()
        while not over.is_set():
            turns += 1
            over.wait(0.0001)

    other = threading.Thread(target=take_turns)
    other.start()
    reading.set()
    found = JsonReader(text, most_values=1 << 22, most_containers=10, most_depth=10).read()
    over.set()
    other.join()
    assert len(found) == 2_000_001
    assert turns > 5, f"the other thread had {turns} turns; beside json.loads it would have none"


def test_a_number_of_thousands_of_digits_is_refused() -> None:
    assert refused(b'{"seed":' + b"1" * 5000 + b"}") == 400
    assert refused(b"[1," + b"1" * 5000 + b",2]") == 400


def test_errors_of_pydantic_have_the_form_that_fastapi_gives_them() -> None:
    with pytest.raises(RequestValidationError) as caught:
        read_body(b'{"prompt":"a","stop_token_ids":[1,"a","b"]}', CompletionBody)
    (error,) = caught.value.errors()
    assert error["loc"] == ("body", "stop_token_ids", 1)


@pytest.mark.parametrize("field", ["stop_token_ids", "allowed_token_ids"])
def test_a_list_of_many_wrong_values_gives_one_error(field: str) -> None:
    with pytest.raises(RequestValidationError) as caught:
        read_body(json.dumps({"prompt": "a", field: ["a"] * 1000}).encode(), CompletionBody)
    assert len(caught.value.errors()) == 1


@pytest.mark.parametrize(
    ("field", "value", "numbers"),
    [
        ("stop_token_ids", [1] * ((1 << 20) + 1), ("1048576", "1048577")),
        ("allowed_token_ids", [1] * ((1 << 20) + 1), ("1048576", "1048577")),
        ("bad_words", ["a"] * 5000, ("4096", "5000")),
    ],
)
def test_a_list_longer_than_any_vocabulary_is_refused(field: str, value: list[Any], numbers: tuple[str, str]) -> None:
    app = openai_app(FakeBackend(), ServerSettings())
    answer = TestClient(app).post("/v1/completions", json={"prompt": "a", field: value})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, field)
    assert all(number in error["message"] for number in numbers)


def test_every_endpoint_reads_its_body_in_steps() -> None:
    """Otherwise FastAPI would read a large or deeply nested body on the event loop."""
    app = make_app(FakeBackend(), ServerSettings())
    paths = [path for path, each in app.openapi()["paths"].items() if "requestBody" in each.get("post", {})]
    assert len(paths) >= 6
    deep = b'{"a":' * 500 + b"1" + b"}" * 500
    for path in paths:
        answer = TestClient(app).post(path, content=deep, headers={"content-type": "application/json"})
        assert answer.json()["error"]["message"] == "the body is nested deeper than 128 levels", path


def test_bodies_that_wait_to_be_read_have_a_common_limit() -> None:
    unread = UnreadBodies(100)
    with unread.hold(500), pytest.raises(HttpError) as caught, unread.hold(1):
        pass
    assert (caught.value.status, caught.value.retry_after) == (503, 1.0)
    with unread.hold(60), unread.hold(40):
        pass
    with unread.hold(100):
        pass


# --- halves of surrogate pairs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (rb'{"prompt": "a\ud800"}', "prompt"),
        (rb'{"stop": ["x", "\uDFFF"]}', "stop[1]"),
        (rb'{"tools": [{"function": {"name": "\ud83d\ud83d\ude00"}}]}', "tools[0].function.name"),
        (rb'{"metadata": {"\ude00": 1}}', "metadata"),
        (rb'{"\ud800": 1}', None),
        (rb'["\\\ud83dx"]', "[0]"),
    ],
)
def test_half_a_surrogate_pair_is_refused_with_its_place(body: bytes, param: str | None) -> None:
    with pytest.raises(RequestError) as caught:
        read_json(body)
    assert caught.value.param == param
    assert "not valid Unicode" in caught.value.message


@pytest.mark.parametrize("body", [rb'"\\ud800"', rb'"\ud83d\ude00"', rb'"\\\\ud800\ud83d\ude00"'])
def test_whole_surrogate_pairs_are_read(body: bytes) -> None:
    read_json(body)


@steady
@given(st.recursive(st.text('\ud83d\ude00\\u"a😀'), lambda inner: st.lists(inner, max_size=3), max_leaves=6))
def test_a_body_that_utf8_cannot_express_is_refused(value: Any) -> None:
    body = json.dumps(value).encode()
    try:
        read_json(body)
        refused = False
    except RequestError:
        refused = True
    try:
        json.dumps(json.loads(body), ensure_ascii=False).encode()
        whole = True
    except UnicodeEncodeError:
        whole = False
    assert refused != whole
