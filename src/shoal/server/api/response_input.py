"""The input of a response: items of a conversation, and the messages that a chat template takes."""

from collections.abc import Mapping, Sequence
from typing import Any

from shoal.server.api.start_requests import identifier
from shoal.server.http.errors import Refusal
from shoal.values import shown

_TEXTS = ("input_text", "output_text", "text")
_KINDS = "a message, a function_call, a function_call_output, a reasoning or an item_reference"
_NAMES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}


def items_of(given: Any) -> list[Any]:
    """
    Raises:
        Refusal: it is neither a text nor a list.
    """
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise Refusal(400, f"input must be a text or a list of items, got {shown(given)}", param="input")
    return given


def references(items: Sequence[Any]) -> list[str]:
    """The ids of other items that these stand for."""
    found = [item.get("id") for item in items if _kind(item) == "item_reference"]
    return [name for name in found if isinstance(name, str)]


def resolved(items: Sequence[Any], known: Mapping[str, Any]) -> list[Any]:
    """The items, each reference replaced by what it stands for. `known`: items by their ids.

    Raises:
        Refusal: there is no such item.
    """
    return [
        _referred(item, known, f"input[{i}]") if _kind(item) == "item_reference" else item
        for i, item in enumerate(items)
    ]


def _referred(item: Mapping[str, Any], known: Mapping[str, Any], where: str) -> Any:
    name = item.get("id")
    if not isinstance(name, str) or name not in known:
        why = (
            f"{where} refers to the item {shown(name)}, which is not here (any more): send the item itself, as the "
            "response that had it gave it"
        )
        raise Refusal(404, why, param=where, code="item_not_found")
    return known[name]


def messages_of(before: Sequence[Any], items: Sequence[Any], instructions: str | None) -> list[dict[str, Any]]:
    """`before`: items that were understood once. Text and calls side by side are one turn, and what was thought before
    them is theirs.

    Raises:
        Refusal: an item can't be read.
    """
    messages: list[dict[str, Any]] = []
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    thought = ""
    places = [f"previous_response_id, item {i}" for i in range(len(before))]
    places += [f"input[{i}]" for i in range(len(items))]
    for item, where in zip([*before, *items], places, strict=True):
        if _kind(item) == "reasoning":
            thought = _thought(item, where)
            continue
        message = _message(item, where)
        if thought and message["role"] == "assistant":
            message["reasoning_content"] = thought
        thought = ""
        last = messages[-1] if messages else {}
        if "tool_calls" in message and last.get("role") == "assistant":
            last.setdefault("tool_calls", []).extend(message["tool_calls"])
        else:
            messages.append(message)
    return messages


def listed(items: Sequence[Any]) -> list[dict[str, Any]]:
    """The items as they are stored and listed: each with an id, messages with parts."""
    return [_listed(item) for item in items]


def _listed(item: Mapping[str, Any]) -> dict[str, Any]:
    kind = _kind(item) or "message"
    name = item.get("id")
    found = {**item, "type": kind, "id": name if isinstance(name, str) else identifier(_NAMES[kind])}
    if kind == "reasoning":
        return {"summary": [], **found}
    if kind == "message":
        by_model = item["role"] == "assistant"
        content = item.get("content")
        texts = [part.get("text") for part in content] if isinstance(content, list) else [content]
        part = {"type": "output_text", "annotations": []} if by_model else {"type": "input_text"}
        found["content"] = [{**part, "text": text} for text in texts]
    return {**found, "status": "completed"}


def _kind(item: Any) -> Any:
    return item.get("type", "message") if isinstance(item, Mapping) else None


def _message(item: Any, where: str) -> dict[str, Any]:
    kind = _kind(item)
    match kind:
        case "message":
            if not isinstance(item.get("role"), str):
                why = f"{where}.role must be a text such as user, got {shown(item.get('role'))}"
                raise Refusal(400, why, param=f"{where}.role")
            return {"role": item["role"], "content": _content(item.get("content"), f"{where}.content")}
        case "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            return {"role": "assistant", "content": "", "tool_calls": [call]}
        case "function_call_output":
            content = _content(item.get("output"), f"{where}.output")
            return {"role": "tool", "tool_call_id": item.get("call_id"), "content": content}
    raise Refusal(400, f"{where} must be {_KINDS}, got {shown(kind or item)}", param=where)


def _content(content: Any, where: str) -> Any:
    if not isinstance(content, list):
        return content
    found = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in _TEXTS:
            why = f"{where}[{i}]: parts of type {shown(kind)} can't be read; this engine takes text"
            raise Refusal(400, why, param=f"{where}[{i}]")
        found.append({"type": "text", "text": part.get("text")})
    return found


def _thought(item: Mapping[str, Any], where: str) -> str:
    """What a model thought, for templates that show it; without it, its summary. What is encrypted is nobody's here."""
    for name in ("content", "summary"):
        parts = item.get(name) or []
        if not isinstance(parts, list) or not all(_is_text(part) for part in parts):
            why = f"{where}.{name} must be a list of parts with a text, got {shown(parts)}"
            raise Refusal(400, why, param=f"{where}.{name}")
        if parts:
            return "\n".join(part["text"] for part in parts)
    return ""


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("text"), str)
