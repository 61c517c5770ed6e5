"""What a request's `tools` and `tool_choice` mean: what the template shows, what binds the output, what reads it."""

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shoal.server.http.errors import Refusal
from shoal.server.tools.parsers import PARSERS, SPECIAL, Named, ToolParser, array
from shoal.server.tools.reading import Arguments, Brackets, Piece, Start
from shoal.structured.schema.node import STRICT
from shoal.values import shown

_NAME = re.compile(r"[\w.\-]{1,128}")
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class ToolPlan:
    shown: list[Any] | None = None  # to the template
    schema: dict[str, Any] | None = None  # that the output must satisfy
    strict: bool = False  # ... in every keyword, or the request is refused
    parser: Callable[[], ToolParser] | None = None  # None: the output is text
    special_tokens: bool = False  # the parser needs them in the text
    named: bool = False  # the client chose the function
    short_ids: bool = False  # the template takes ids of nine characters only
    most: int | None = None  # calls in an output


def plan_tools(tools: object, choice: object, parser: str | None, *, parallel: bool = True) -> ToolPlan:
    """
    Args:
        parser: the name of the one for this model, for calls that nothing enforces.
        parallel: may an output have several calls?

    Raises:
        Refusal: they are malformed, or `auto` and there is no parser.
    """
    functions = _functions(tools)
    if choice is None:
        choice = "auto"
    if choice == "none" or (choice == "auto" and not functions):
        return ToolPlan()
    if not functions:
        raise Refusal(400, "tool_choice needs tools: give at least one", param="tool_choice")
    assert isinstance(tools, list)
    if choice == "auto":
        if parser is None:
            why = (
                "tool_choice auto needs to know how the model writes calls: start the server with --tool-call-parser, "
                "or use tool_choice none, required or a named function"
            )
            raise Refusal(400, why, param="tool_choice")
        special = parser in SPECIAL
        return ToolPlan(
            tools,
            None,
            parser=PARSERS[parser],
            special_tokens=special,
            short_ids=parser == "mistral",
            most=None if parallel else 1,
        )
    short = parser == "mistral"
    if choice == "required":
        return ToolPlan(tools, _any_call(functions, parallel=parallel), parser=array, short_ids=short)
    name = _chosen(choice)
    if name not in functions:
        raise Refusal(400, f"tool_choice names {shown(name)}, which is none of the tools", param="tool_choice")
    function = functions[name]
    return ToolPlan(tools, function.schema, function.strict, lambda: Named(name), named=True, short_ids=short)


@dataclass(frozen=True, slots=True)
class _Function:
    schema: dict[str, Any]  # of the arguments
    strict: bool


def _functions(tools: object) -> dict[str, _Function]:
    """Name -> function."""
    if tools is None:
        return {}
    if not isinstance(tools, list):
        raise Refusal(400, f"tools must be a list of objects, got {shown(tools)}", param="tools")
    found: dict[str, _Function] = {}
    for i, tool in enumerate(tools):
        where = f"tools[{i}]"
        if not isinstance(tool, Mapping) or tool.get("type") != "function":
            raise Refusal(400, f"{where} must be an object of type function, got {shown(tool)}", param=where)
        function = tool.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str) or not _NAME.fullmatch(name):
            why = f"{where}.function needs a name of letters, digits, dots, dashes and underlines, got {shown(name)}"
            raise Refusal(400, why, param=f"{where}.function.name")
        if name in found:
            raise Refusal(400, f"tools has the name {name} twice", param=f"{where}.function.name")
        strict = function.get("strict")
        if strict is not None and not isinstance(strict, bool):
            why = f"{where}.function.strict must be true or false, got {shown(strict)}"
            raise Refusal(400, why, param=f"{where}.function.strict")
        found[name] = _Function(_of_object(function.get("parameters"), f"{where}.function.parameters"), bool(strict))
    return found


def _of_object(parameters: object, where: str) -> dict[str, Any]:
    """The schema of arguments, which are an object whether it says so or not."""
    if parameters is True:
        return {"type": "object"}
    if parameters is not None and not isinstance(parameters, Mapping):
        raise Refusal(400, f"{where} must be a JSON schema, got {shown(parameters)}", param=where)
    kind = (parameters or {}).get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        why = f"{where}.type must be object, got {shown(kind)}: the arguments of a call are an object"
        raise Refusal(400, why, param=where)
    return {**parameters, "type": "object"} if parameters else _NO_PARAMETERS


def _chosen(choice: object) -> object:
    if isinstance(choice, Mapping) and choice.get("type") == "function" and isinstance(choice.get("function"), Mapping):
        return choice["function"].get("name")
    why = f"tool_choice must be none, auto, required or a function by name, got {shown(choice)}"
    raise Refusal(400, why, param="tool_choice")


def _any_call(functions: Mapping[str, _Function], *, parallel: bool) -> dict[str, Any]:
    """The schema of a list of calls. Each function's schema lies whole in `$defs`, where its `$id` makes it a part of
    its own: references inside of it lead to what they led to."""
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


class CallDeltas:
    """An output's pieces as OpenAI's deltas: content, and parts of `tool_calls`.

    A call that ends before its arguments do is none, unless the output's length has cut it: then OpenAI's API gives
    what there is of it. Where the client waits for the whole, or may itself cut calls by its `stop`, calls are handed
    out `whole`; else a client has the beginning of such a call already.
    """

    def __init__(self, plan: ToolPlan, *, whole: bool) -> None:
        assert plan.parser is not None
        self._parser = plan.parser()
        self._plan = plan
        self._whole = whole
        self._held: list[dict[str, Any]] = []  # of the call that has not ended
        self._brackets: Brackets | None = None  # of its arguments; None between calls
        self.calls = 0

    @property
    def cut(self) -> bool:
        """Is there a call whose arguments have not ended?"""
        return self._brackets is not None

    def feed(self, text: str, finish: str | None) -> list[dict[str, Any]]:
        """The deltas of this text. `finish`: why nothing follows, if so."""
        pieces = self._parser.feed(text) if text else []
        found: list[dict[str, Any]] = []
        for piece in pieces + (self._parser.finish() if finish is not None else []):
            delta = self._delta(piece)
            if delta is None:
                continue
            self._follow(piece)
            if not self._whole or isinstance(piece, str):
                found.append(delta)
                continue
            self._held.append(delta)
            if not self.cut:
                found += self._held
                self._held = []
        return found + (self._held if finish == "length" else [])

    def _follow(self, piece: Piece) -> None:
        if isinstance(piece, Start):
            self._brackets = Brackets()
        elif isinstance(piece, Arguments) and self._brackets is not None:
            for character in piece.text:
                if self._brackets.step(character) and not self._brackets.depth:
                    self._brackets = None
                    break

    def finish_of(self, reason: str | None) -> str | None:
        """Why the output has ended, as OpenAI's API says it."""
        calls = self.calls and not self.cut and not self._plan.named
        return "tool_calls" if reason == "stop" and calls else reason

    def _delta(self, piece: Piece) -> dict[str, Any] | None:
        if isinstance(piece, str):  # where a schema demands calls, it is one that was cut off
            return {"content": piece} if self._plan.schema is None else None
        self.calls += isinstance(piece, Start)
        if self._plan.most is not None and self.calls > self._plan.most:
            return None
        if isinstance(piece, Start):
            name = secrets.token_hex(12)
            function = {"name": piece.name, "arguments": ""}
            call = {"id": name[:9] if self._plan.short_ids else f"call_{name}", "type": "function"}
            return {"tool_calls": [{"index": self.calls - 1, **call, "function": function}]}
        return {"tool_calls": [{"index": self.calls - 1, "function": {"arguments": piece.text}}]}


def message_of(deltas: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The message that the deltas add up to."""
    content = "".join(delta["content"] for delta in deltas if "content" in delta)
    calls: list[dict[str, Any]] = []
    for delta in deltas:
        for part in delta.get("tool_calls", ()):
            if part["index"] == len(calls):
                calls.append({**part, "function": dict(part["function"])})
            else:
                calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    for call in calls:
        del call["index"]
    message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else "")}
    return message | ({"tool_calls": calls} if calls else {})
