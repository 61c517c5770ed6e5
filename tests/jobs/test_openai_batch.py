"""Requests and answers in the format of OpenAI's batch API."""

import json
from pathlib import Path
from typing import Any

import pytest

from shoal.errors import RequestError
from shoal.jobs.entries import JobEntry
from shoal.jobs.output_lines import failed_line, output_line
from shoal.jobs.parameters import JobParameters
from shoal.jobs.prompt_file import PromptFile
from shoal.outputs import CompletionOutput, Logprob, RequestOutput
from shoal.params import SamplingParams, StructuredOutputsParams

TALK = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
PARAMETERS = JobParameters(SamplingParams(temperature=0, max_tokens=64), {})


def entry(tmp_path: Path, body: Any, *, chat: bool = False, **changes: Any) -> JobEntry:
    url = "/v1/chat/completions" if chat else "/v1/completions"
    prompt = {"messages": TALK} if chat else {"prompt": "hi"}
    body = {**prompt, **body} if isinstance(body, dict) else body
    line = {"custom_id": "r1", "method": "POST", "url": url, "body": body, **changes}
    path = tmp_path / "batch.jsonl"
    path.write_text('{"prompt": "a"}\n' + json.dumps(line) + "\n")
    return list(PromptFile(path))[1]


def params(tmp_path: Path, body: dict[str, Any], *, chat: bool = False) -> SamplingParams:
    found = entry(tmp_path, body, chat=chat)
    assert found.error is None, found.error
    return PARAMETERS.for_entry(found)


@pytest.mark.parametrize("prompt", ["hi", ["hi"], [1, 2], [[1, 2]]])
def test_prompts(tmp_path: Path, prompt: Any) -> None:
    found = entry(tmp_path, {"prompt": prompt, "model": "m"})
    assert (found.text, found.tokens) in [
        ("hi", []),
        (None, [1, 2]),
    ]
    assert (found.ids, found.endpoint, found.model) == ({"custom_id": "r1"}, "/v1/completions", "m")
    assert entry(tmp_path, {}, chat=True).messages == TALK


@pytest.mark.parametrize(
    ("chat", "body", "changes"),
    [
        (False, {}, {"max_tokens": 16}),
        (True, {}, {"max_tokens": None}),
        (True, {"max_tokens": 5, "max_completion_tokens": 7}, {"max_tokens": 7}),
        (True, {"max_tokens": 5, "temperature": None}, {"max_tokens": 5}),
        (False, {"logprobs": 3}, {"max_tokens": 16, "logprobs": 3}),
        (True, {"logprobs": True, "top_logprobs": 2}, {"max_tokens": None, "logprobs": 2}),
        (True, {"logprobs": True}, {"max_tokens": None, "logprobs": 0}),
        (True, {"logprobs": False}, {"max_tokens": None}),
        (True, {"stop": "x", "seed": 3, "n": 2}, {"max_tokens": None, "stop": ["x"], "seed": 3, "n": 2}),
        (False, {"logit_bias": {"5": -100}, "echo": False}, {"max_tokens": 16, "logit_bias": {5: -100.0}}),
        (False, {"top_k": 4, "min_p": 0.1, "user": "u"}, {"max_tokens": 16, "top_k": 4, "min_p": 0.1}),
        (True, {"response_format": {"type": "text"}}, {"max_tokens": None}),
    ],
)
def test_parameters(tmp_path: Path, chat: bool, body: dict[str, Any], changes: dict[str, Any]) -> None:
    assert params(tmp_path, body, chat=chat) == SamplingParams(**changes)


def test_structured_outputs(tmp_path: Path) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}
    strict = StructuredOutputsParams(json=SCHEMA, strict=True)
    assert params(tmp_path, {"response_format": wanted}).structured_outputs == strict
    del wanted["json_schema"]["strict"]  # type: ignore[attr-defined]
    assert params(tmp_path, {"response_format": wanted}).structured_outputs == StructuredOutputsParams(json=SCHEMA)
    anything = params(tmp_path, {"response_format": {"type": "json_object"}}).structured_outputs
    assert anything == StructuredOutputsParams(json_object=True)


@pytest.mark.parametrize(
    ("body", "changes", "says"),
    [
        ({"prompt": ["a", "b"]}, {}, "2 prompts"),
        ({"prompt": 5}, {}, "must be a string"),
        ({"prompt": None}, {}, "must be a string"),
        ({"echo": True}, {}, "`body.echo` is not supported"),
        ({"tools": [{}]}, {}, "`body.tools` is not supported"),
        ({"response_format": {"type": "xml"}}, {}, "text, json_object or json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, {}, "must be a JSON schema"),
        ({"response_format": 5}, {}, "text, json_object or json_schema"),
        ({}, {"method": "GET"}, "`method` must be POST"),
        ({}, {"url": "/v1/embeddings"}, "`url` must be /v1/completions or"),
        ({}, {"url": ["x"]}, "`url` must be"),
        ({}, {"custom_id": 5}, "needs a text `custom_id`"),
        ([], {}, "`body` must be a JSON object"),
    ],
)
def test_a_request_that_can_not_be_answered_fails_alone(
    tmp_path: Path, body: Any, changes: dict[str, Any], says: str
) -> None:
    assert says in str(entry(tmp_path, body, **changes).error)


@pytest.mark.parametrize(
    ("body", "says"),
    [({"logprobs": 3}, "true or false"), ({"top_logprobs": 3}, "needs `logprobs`"), ({"messages": "x"}, "`messages`")],
)
def test_a_chat_request_that_can_not_be_answered_fails_alone(tmp_path: Path, body: Any, says: str) -> None:
    assert says in str(entry(tmp_path, body, chat=True).error)


def test_parameters_out_of_range_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"top_p must be in \(0, 1\]"):
        PARAMETERS.for_entry(entry(tmp_path, {"top_p": 2}))


def test_request_overrides_flags_and_flags_override_the_model(tmp_path: Path) -> None:
    def with_model(base: SamplingParams) -> SamplingParams:
        return SamplingParams.from_dict({"top_k": 7, "top_p": 0.5}, base)

    parameters = JobParameters(SamplingParams(temperature=0, max_tokens=64), {"top_p": 0.6, "n": 1}, with_model)
    plain = JobEntry(0, "", prompt="a", sampling={"min_p": 0.2})
    assert parameters.for_entry(plain) == SamplingParams(temperature=0, max_tokens=64, top_k=7, top_p=0.6, min_p=0.2)
    request = parameters.for_entry(entry(tmp_path, {"top_p": 0.7}))
    assert request == SamplingParams(temperature=1, max_tokens=16, top_k=7, top_p=0.7)


LOGPROBS = (
    {5: Logprob(-0.5, 1, "he"), 6: Logprob(float("-inf"), 2, None)},
    {7: Logprob(-1.5, 2, "y"), 8: Logprob(-0.5, 1, "z")},
)
OUTPUT = RequestOutput("0", "hi", (1, 2, 3), (CompletionOutput(0, "hey", (5, 7), "stop", -2.0, LOGPROBS, "!"),))


def test_answers_to_completions(tmp_path: Path) -> None:
    line = json.loads(json.dumps(output_line(entry(tmp_path, {"model": "theirs"}), "d" * 16, OUTPUT, "ours")))
    assert (line["custom_id"], line["error"], line["index"], line["digest"]) == ("r1", None, 1, "d" * 16)
    assert line["response"]["status_code"] == 200
    body = line["response"]["body"]
    assert (body["object"], body["model"]) == ("text_completion", "theirs")
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert body["choices"] == [
        {
            "index": 0,
            "text": "hey",
            "finish_reason": "stop",
            "stop_reason": "!",
            "logprobs": {
                "text_offset": [0, 2],
                "tokens": ["he", "y"],
                "token_logprobs": [-0.5, -1.5],
                "top_logprobs": [{"he": -0.5, "token_id:6": -9999.0}, {"y": -1.5, "z": -0.5}],
            },
        }
    ]


def test_answers_to_chats(tmp_path: Path) -> None:
    body = output_line(entry(tmp_path, {}, chat=True), "d", OUTPUT, "ours")["response"]["body"]
    assert (body["object"], body["model"]) == ("chat.completion", "ours")
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "hey"}
    first = choice["logprobs"]["content"][0]
    assert (first["token"], first["logprob"], first["bytes"]) == ("he", -0.5, [104, 101])
    assert [each["token"] for each in first["top_logprobs"]] == ["he", "token_id:6"]
    fewer = entry(tmp_path, {"logprobs": True, "top_logprobs": 1}, chat=True)
    (choice,) = output_line(fewer, "d", OUTPUT, "ours")["response"]["body"]["choices"]
    assert [len(each["top_logprobs"]) for each in choice["logprobs"]["content"]] == [1, 1]


def test_failed_lines(tmp_path: Path) -> None:
    line = failed_line(entry(tmp_path, {}), "too long")
    assert (line["custom_id"], line["index"], line["response"]) == ("r1", 1, None)
    assert line["error"] == {"code": "invalid_request", "message": "too long"}
    refused = RequestOutput("0", "hi", (), (), error="too long")
    assert output_line(entry(tmp_path, {}), "", refused, "m") == line


def test_lines_of_our_own_format() -> None:
    mine = JobEntry(3, "", prompt="hi", ids={"custom_id": "x"})
    line = json.loads(json.dumps(output_line(mine, "d" * 16, OUTPUT, "m"), allow_nan=False))
    assert list(line) == ["index", "custom_id", "prompt", "prompt_token_ids", "outputs", "digest"]
    (output,) = line["outputs"]
    assert (output["text"], output["token_ids"], output["finish_reason"], output["stop_reason"]) == (
        ("hey", [5, 7], "stop", "!")
    )
    assert output["logprobs"][0]["6"] == {"logprob": -9999.0, "rank": 2, "decoded_token": None}
    scored = RequestOutput("0", "hi", (1, 2), (), prompt_logprobs=(None, {2: Logprob(-1.0, 1, "i")}))
    assert output_line(mine, "d", scored, "m")["prompt_logprobs"] == [
        None,
        {"2": {"logprob": -1.0, "rank": 1, "decoded_token": "i"}},
    ]
    assert failed_line(mine, "why")["error"] == "why"


@pytest.mark.parametrize(
    ("body", "changes"),
    [({"echo": True}, {}), ({"stream": True}, {}), ({}, {"url": "/v1/embeddings"}), ({}, {"url": None}),
     ({}, {"method": "GET"}), (5, {})],
)  # fmt: skip
def test_a_refused_request_is_answered_in_the_batch_format(tmp_path: Path, body: Any, changes: dict[str, Any]) -> None:
    refused = entry(tmp_path, body, **changes)
    assert refused.error is not None
    assert failed_line(refused, refused.error) == {
        "id": "batch_req-00000001",
        "custom_id": "r1",
        "response": None,
        "error": {"code": "invalid_request", "message": refused.error},
        "index": 1,
    }


def test_a_refused_request_without_an_id(tmp_path: Path) -> None:
    answer = failed_line(entry(tmp_path, {}, custom_id=None), "why")
    assert answer["error"]["message"] == "why"
    assert "custom_id" not in answer


@pytest.mark.parametrize("chat", [False, True])
def test_token_ids_are_returned_beside_texts(tmp_path: Path, chat: bool) -> None:
    asked = {"return_token_ids": True, "return_tokens_as_token_ids": True, "logprobs": True if chat else 0}
    found = entry(tmp_path, {**asked, "cache_salt": "a", "truncate_prompt_tokens": 3}, chat=chat)
    assert (found.error, found.cache_salt, PARAMETERS.for_entry(found).truncate_prompt_tokens) == (None, "a", 3)
    output = CompletionOutput(0, "x", (7,), "stop", -1.0, ({7: Logprob(-1.0, 1, "x")},))
    line = output_line(found, "", RequestOutput("0", "hi", (1, 2), (output,)), "m")
    body = line["response"]["body"]
    (choice,) = body["choices"]
    assert (choice["token_ids"], (body if chat else choice)["prompt_token_ids"]) == ([7], [1, 2])
    names = [position["token"] for position in choice["logprobs"]["content"]] if chat else choice["logprobs"]["tokens"]
    assert names == ["token_id:7"]


def test_return_token_ids_must_be_true_or_false(tmp_path: Path) -> None:
    assert "`body.return_token_ids` must be true or false" in str(entry(tmp_path, {"return_token_ids": 1}).error)
