"""The plan for the tools of a request: what the chat template shows, what the output must obey, and who reads it."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shoal.errors import RequestError
from shoal.openai.tools.parsers import PARSERS, WITH_SPECIAL_TOKENS, Named, ToolParser, call_list
from shoal.structured.schema.node import STRICT
from shoal.values import shown

_NAME = re.compile(r"[\w.\-]{1,128}")
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """What `tools` and `tool_choice` of a request mean for its prompt and its output."""

    shown: list[Any] | None = None  # the tools that the chat template shows to the model
    schema: dict[str, Any] | None = None  # the JSON schema that the output must obey
    strict: bool = False  # True: a schema with a keyword that can't be obeyed is refused
    parser: Callable[[], ToolParser] | None = None  # makes the parser of an output; None: the output is text
    special_tokens: bool = False  # True: the parser needs special tokens in the text
    named: bool = False  # True: the client chose the function
    short_ids: bool = False  # True: the chat template accepts only ids of nine characters
    max_calls: int | None = None  # the most calls in an output; None: any number


def plan_tools(tools: object, choice: object, parser: str | None, *, parallel: bool = True) -> ToolPlan:
    """Return the plan for the `tools` and the `tool_choice` of a request.

    Args:
        parser: the name of the parser for calls that the model makes freely.
        parallel: whether an output may have several calls.

    Raises:
        RequestError: they are malformed, or `auto` is asked for and there is no parser.
    """
    functions = _functions(tools)
    if choice is None:
        choice = "auto"
    if choice == "none" or (choice == "auto" and not functions):
        return ToolPlan()
    if not functions:
        raise RequestError.about("tool_choice", "needs tools: give at least one")
    assert isinstance(tools, list)
    short_ids = parser == "mistral"
    if choice == "auto":
        if parser is None:
            why = (
                "auto needs to know how the model writes calls: start the server with --tool-call-parser, or use "
                "tool_choice none, required or a named function"
            )
            raise RequestError.about("tool_choice", why)
        return ToolPlan(
            tools,
            parser=PARSERS[parser],
            special_tokens=parser in WITH_SPECIAL_TOKENS,
            short_ids=short_ids,
            max_calls=None if parallel else 1,
        )
    if choice == "required":
        schema = _schema_of_calls(functions, parallel=parallel)
        return ToolPlan(tools, schema, parser=call_list, short_ids=short_ids)
    name = _chosen_name(choice)
    if name not in functions:
        raise RequestError.about("tool_choice", f"names {shown(name)}, which is none of the tools")
    function = functions[name]
    return ToolPlan(tools, function.schema, function.strict, lambda: Named(name), named=True, short_ids=short_ids)


@dataclass(frozen=True, slots=True)
class _Function:
    schema: dict[str, Any]  # of the arguments
    strict: bool


def _functions(tools: object) -> dict[str, _Function]:
    """Return the functions of a request by their names."""
    if tools is None:
        return {}
    if not isinstance(tools, list):
        raise RequestError.about("tools", f"must be a list of objects, got {shown(tools)}")
    found: dict[str, _Function] = {}
    for i, tool in enumerate(tools):
        where = f"tools[{i}]"
        if not isinstance(tool, Mapping) or tool.get("type") != "function":
            raise RequestError.about(where, f"must be an object of type function, got {shown(tool)}")
        function = tool.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str) or not _NAME.fullmatch(name):
            why = f"{where}.function needs a name of letters, digits, dots, dashes and underscores, got {shown(name)}"
            raise RequestError(why, f"{where}.function.name")
        if name in found:
            raise RequestError(f"tools has the name {name} twice", f"{where}.function.name")
        strict = function.get("strict")
        if strict is not None and not isinstance(strict, bool):
            raise RequestError.about(f"{where}.function.strict", f"must be true or false, got {shown(strict)}")
        schema = _schema_of_arguments(function.get("parameters"), f"{where}.function.parameters")
        found[name] = _Function(schema, bool(strict))
    return found


def _schema_of_arguments(parameters: object, where: str) -> dict[str, Any]:
    """Return the schema of a function's arguments, which always says that they are an object."""
    if parameters is True:
        return {"type": "object"}
    if parameters is not None and not isinstance(parameters, Mapping):
        raise RequestError.about(where, f"must be a JSON schema, got {shown(parameters)}")
    kind = (parameters or {}).get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        why = f"must be object, got {shown(kind)}: the arguments of a call are an object"
        raise RequestError.about(where, why, subject=f"{where}.type")
    return {**parameters, "type": "object"} if parameters else _NO_PARAMETERS


def _chosen_name(choice: object) -> object:
    if isinstance(choice, Mapping) and choice.get("type") == "function" and isinstance(choice.get("function"), Mapping):
        return choice["function"].get("name")
    raise RequestError.about("tool_choice", f"must be none, auto, required or a function by name, got {shown(choice)}")


def _schema_of_calls(functions: Mapping[str, _Function], *, parallel: bool) -> dict[str, Any]:
    """Return the schema of a list of calls.

    The schema of each function is in `$defs` as a whole, with an `$id`: so the references in it keep their meaning.
    """
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "parameters": {"$ref": f"#/$defs/{name}"}},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for name in functions
    ]
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    if not parallel:
        schema["maxItems"] = 1
    parts = {
        name: {**each.schema, "$id": each.schema.get("$id", f"tools/{i}"), STRICT: each.strict}
        for i, (name, each) in enumerate(functions.items())
    }
    return schema | {"$defs": parts}
