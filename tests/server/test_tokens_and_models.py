"""/tokenize, /detokenize and /v1/models with a fake engine."""

import json
from typing import Any

import pytest
from openai.types import Model
from starlette.testclient import TestClient

from shoal.errors import ConfigError
from shoal.server.app import openai_app
from shoal.server.settings import ServerSettings
from support.fake_backend import FakeBackend

TALK = [{"role": "user", "content": "hi there"}]


def client(**settings: Any) -> TestClient:
    return TestClient(openai_app(FakeBackend(), ServerSettings(**settings)))


@pytest.mark.slow
def test_a_text_becomes_tokens_and_text_again() -> None:
    tokenizer = FakeBackend().tokenizer
    said = client().post("/tokenize", json={"prompt": "wörld 🐟", "return_token_strs": True}).json()
    assert said["tokens"] == tokenizer.encode("wörld 🐟")
    assert (said["count"], said["max_model_len"]) == (len(said["tokens"]), 512)
    assert said["token_strs"] == [tokenizer.token_text(token) for token in said["tokens"]]
    plain = client().post("/tokenize", json={"prompt": "wörld 🐟", "add_special_tokens": False}).json()
    assert plain["token_strs"] is None
    assert client().post("/detokenize", json={"tokens": plain["tokens"]}).json() == {"prompt": "wörld 🐟"}


def test_a_conversation_becomes_the_tokens_of_its_template() -> None:
    said = client().post("/tokenize", json={"messages": TALK}).json()
    text = client().post("/detokenize", json={"tokens": said["tokens"]}).json()["prompt"]
    assert text.endswith("<|user|>hi there<|end|><|assistant|>")
    bare = client().post("/tokenize", json={"messages": TALK, "add_generation_prompt": False}).json()
    assert bare["tokens"] == said["tokens"][:-1]


def test_a_conversation_may_be_longer_than_the_context() -> None:
    said = client().post("/tokenize", json={"messages": [{"role": "user", "content": "hi " * 1000}]}).json()
    assert said["count"] > said["max_model_len"]


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": TALK}, 400, "prompt"),
        ("/tokenize", {"prompt": "\ud800"}, 400, "prompt"),
        ("/tokenize", {"messages": [{"role": "user"}]}, 400, "messages[0]"),
        ("/tokenize", {"prompt": "a", "model": "x"}, 404, "model"),
        ("/detokenize", {"tokens": [5, 1 << 40]}, 400, "tokens[1]"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens[0]"),
        ("/detokenize", {}, 400, "tokens"),
    ],
)
def test_errors_name_the_field(path: str, body: Any, status: int, param: str) -> None:
    answer = client().post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text


def test_models_are_listed_by_every_served_name() -> None:
    names = ("org/first", "second")
    served = client(served_model_names=names)
    listed = served.get("/v1/models").json()
    assert [Model.model_validate(each).id for each in listed["data"]] == list(names)
    assert served.get("/v1/models/org/first").json() == listed["data"][0]
    assert served.get("/v1/models/demo").status_code == 404
    assert client().get("/v1/models/demo").json()["max_model_len"] == 512


def test_an_unknown_parser_is_refused() -> None:
    with pytest.raises(ConfigError, match="hermes"):
        ServerSettings(tool_call_parser="x")


def test_the_openapi_description_has_every_endpoint_and_its_errors() -> None:
    described = client().get("/openapi.json").json()
    paths = described["paths"]
    assert set(paths) >= {"/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/models", "/tokenize"}
    for operations in paths.values():
        for operation in operations.values():
            assert "200" in operation["responses"]
            assert "HTTPValidationError" not in str(operation["responses"])
    assert {"404", "422", "429", "503"} <= set(paths["/v1/chat/completions"]["post"]["responses"])
