"""Arguments of tool calls are complete JSON objects, for all schemas and even if the output is cut."""

import json
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletion
from openai.types.responses import Response
from starlette.testclient import TestClient
from tokenizers import Tokenizer

import shoal
from shoal.errors import RequestError
from shoal.openai.tools.tool_plan import plan_tools
from shoal.outputs import FinishReason
from shoal.params import StructuredOutputsParams
from shoal.server.app import openai_app
from shoal.server.settings import ServerSettings
from shoal.structured.matcher import GrammarState, Vocabulary
from shoal.text.structured_outputs import grammar_text
from support.fake_backend import FakeBackend

NUMBER = {"properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
SCHEMAS: dict[str, tuple[Any, list[str]]] = {  # (parameters of a tool, the ARGUMENTS that they allow)
    "missing": (None, ["{}"]),
    "empty": ({}, ["{}"]),
    "true": (True, ["{}", '{"n": 1}', '{"q": 3}']),
    "a title alone": ({"title": "Pick"}, ["{}", '{"n": 1}', '{"q": 3}']),
    "properties alone": (NUMBER, ['{"n": 1}']),
    "several types": ({**NUMBER, "type": ["object", "null", "integer"]}, ['{"n": 1}']),
    "any of": ({"anyOf": [{**NUMBER, "type": "object"}, {"type": "integer"}, {"type": "null"}]}, ['{"n": 1}']),
    "all of": ({"allOf": [NUMBER]}, ['{"n": 1}']),
    "a reference": ({"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [NUMBER, {"const": 7}]}}}, ['{"n": 1}']),
    "values": ({"enum": [7, True, {"n": 1}, "x"]}, ['{"n": 1}']),
}
ARGUMENTS = ["true", "7", "null", '"x"', "[]", "{}", '{"n": 1}', '{"q": 3}']
TALK = [{"role": "user", "content": "hi"}]
TOOL = {"name": "pick", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}
CHOSEN = {"type": "function", "function": {"name": "pick"}}


@pytest.mark.parametrize(("parameters", "allowed"), SCHEMAS.values(), ids=SCHEMAS)
@pytest.mark.parametrize("choice", ["required", CHOSEN], ids=["required", "by name"])
def test_arguments_are_an_object_for_every_schema(parameters: Any, allowed: list[str], choice: Any) -> None:
    function = {"name": "pick"} | ({} if parameters is None else {"parameters": parameters})
    plan = plan_tools([{"type": "function", "function": function}], choice, None)
    text = (Path(shoal.__file__).parent / "demo_model" / "tokenizer.json").read_text("utf-8")
    grammar = GrammarState.compile(
        grammar_text(StructuredOutputsParams(json=plan.schema)).text, Vocabulary(text, (1,), 640)
    )
    encode = Tokenizer.from_str(text).encode
    found = []
    for arguments in ARGUMENTS:
        output = arguments if choice == CHOSEN else f'[{{"name": "pick", "parameters": {arguments}}}]'
        tokens = (*encode(output, add_special_tokens=False).ids, 1)
        if grammar.count_valid(tokens) == len(tokens):
            found.append(arguments)
    assert found == allowed


@pytest.mark.parametrize("parameters", [7, False, [], "x", {"type": "string"}, {"type": ["null", "array"]}])
def test_parameters_that_cannot_describe_an_object_are_refused(parameters: Any) -> None:
    tools = [{"type": "function", "function": {"name": "pick", "parameters": parameters}}]
    with pytest.raises(RequestError) as caught:
        plan_tools(tools, "required", None)
    assert caught.value.param is not None
    assert caught.value.param.startswith("tools[0].function.parameters")


# --- outputs that are cut ------------------------------------------------------------------------------------------


def post(path: str, says: str, finish: FinishReason, **body: Any) -> Any:
    """Return the answer to a request whose output has this text and this finish reason."""
    backend = FakeBackend(lambda _: [says[i : i + 3] for i in range(0, len(says), 3)], finish=finish)
    settings = ServerSettings(tool_call_parser="hermes")
    return TestClient(openai_app(backend, settings)).post(path, json=body)


def chat(says: str, finish: FinishReason, *, stream: bool, **body: Any) -> tuple[str, list[tuple[str, str]], str]:
    """Return (content, calls, finish_reason) of a chat."""
    tools = [{"type": "function", "function": TOOL}]
    answer = post("/v1/chat/completions", says, finish, messages=TALK, tools=tools, stream=stream, **body)
    if not stream:
        choice = ChatCompletion.model_validate(answer.json()).model_dump()["choices"][0]
        calls = [call["function"] for call in choice["message"]["tool_calls"] or ()]
        found = [(call["name"], call["arguments"]) for call in calls]
        return choice["message"]["content"] or "", found, choice["finish_reason"]
    content, calls, reason = "", [], ""
    for line in answer.text.splitlines():
        if line.startswith("data: {"):
            choice = json.loads(line[6:])["choices"][0]
            reason = choice["finish_reason"] or reason
            content += choice["delta"].get("content") or ""
            for part in choice["delta"].get("tool_calls", ()):
                if "id" in part:
                    calls.append([part["function"]["name"], ""])
                calls[part["index"]][1] += part["function"]["arguments"]
    return content, [(name, arguments) for name, arguments in calls], reason


CUT: dict[str, Any] = {  # (tool_choice, the output up to the stop text)
    "by name": (CHOSEN, '{"a": "x'),
    "required": ("required", '[{"name": "pick", "parameters": {"a": "x'),
    "auto": ("auto", '<tool_call>{"name": "pick", "arguments": {"a": "x'),
}


@pytest.mark.parametrize(("choice", "says"), CUT.values(), ids=CUT)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", [{"stop": ["y"]}, {"stop_token_ids": [5]}])
def test_a_call_that_is_cut_by_the_clients_stop_is_left_out(
    choice: Any, says: str, stream: bool, stop: dict[str, Any]
) -> None:
    assert chat(says, "stop", stream=stream, tool_choice=choice, **stop) == ("", [], "stop")


@pytest.mark.parametrize(("choice", "says"), CUT.values(), ids=CUT)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", [{}, {"stop": ["y"]}])
def test_a_call_that_the_length_limit_cuts_is_sent_as_far_as_it_goes(
    choice: Any, says: str, stream: bool, stop: dict[str, Any]
) -> None:
    assert chat(says, "length", stream=stream, tool_choice=choice, **stop) == ("", [("pick", '{"a": "x')], "length")


@pytest.mark.parametrize("stream", [False, True])
def test_complete_calls_before_a_cut_call_are_sent(stream: bool) -> None:
    says = '[{"name": "pick", "parameters": {"a": "1"}}, {"name": "pick", "parameters": {"a": "x'
    found = chat(says, "stop", stream=stream, tool_choice="required", stop=["y"])
    assert found == ("", [("pick", '{"a": "1"}')], "stop")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("end", ["", "}", "}</tool_call>"])
def test_a_stop_after_the_arguments_leaves_the_call_whole(stream: bool, end: str) -> None:
    says = '<tool_call>{"name": "pick", "arguments": {"a": "}"}' + end
    found = chat(says, "stop", stream=stream, tool_choice="auto", stop=["</tool_call>"])
    assert found == ("", [("pick", '{"a": "}"}')], "tool_calls")


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_the_model_itself_breaks_off_is_no_call(stream: bool) -> None:
    _, calls, reason = chat(CUT["auto"][1], "stop", stream=stream, tool_choice="auto")
    assert reason == "stop"
    assert stream or not calls


@pytest.mark.parametrize("arguments", ["7", "true", "[1]", '"7"', '"x"'])
def test_a_call_whose_arguments_are_no_object_is_text(arguments: str) -> None:
    says = f'<tool_call>{{"name": "pick", "arguments": {arguments}}}</tool_call>'
    content, calls, reason = chat(says, "stop", stream=False, tool_choice="auto")
    assert (calls, reason) == ([], "stop")
    assert arguments in content


@pytest.mark.parametrize(("written", "read"), [("null", {}), ('""', {}), ('"{\\"a\\": 1}"', {"a": 1})])
def test_arguments_in_other_forms_become_objects(written: str, read: Any) -> None:
    says = f'<tool_call>{{"name": "pick", "arguments": {written}}}</tool_call>'
    _, ((_, arguments),), reason = chat(says, "stop", stream=False, tool_choice="auto")
    assert (json.loads(arguments), reason) == (read, "tool_calls")


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_leaves_out_a_call_that_is_cut_by_the_clients_stop(stream: bool) -> None:
    tools = [{"type": "function", **TOOL}]
    asked = {"input": "hi", "tools": tools, "tool_choice": "required", "stop": ["y"], "stream": stream}
    answer = post("/v1/responses", CUT["required"][1], "stop", **asked)
    body = answer.json() if not stream else json.loads(answer.text.strip().rpartition("data: ")[2])["response"]
    assert "function_call" not in answer.text.replace('"function_call_', "")
    assert [item["type"] for item in body["output"]] == ["message"]
    Response.model_validate(body)
