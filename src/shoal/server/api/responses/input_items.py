"""The input of a response: items of a conversation, and the messages that a chat template makes a prompt of."""

from collections.abc import Mapping, Sequence
from typing import Any

from shoal.errors import RequestError
from shoal.server.api.service import new_id
from shoal.server.http.errors import HttpError
from shoal.values import shown

_TEXTS = ("input_text", "output_text", "text")
_KINDS = "a message, a function_call, a function_call_output, a reasoning or an item_reference"
_NAMES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}


def items_of(given: Any) -> list[Any]:
    """Return the items of an input, which may also be a text.

    Raises:
        RequestError: it is neither a text nor a list of items.
    """
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise RequestError.about("input", f"must be a string or a list of items, got {shown(given)}")
    return given


def references(items: Sequence[Any]) -> list[str]:
    """Return the ids of the items that other requests have sent, and that these items refer to."""
    found = [item.get("id") for item in items if _kind(item) == "item_reference"]
    return [name for name in found if isinstance(name, str)]


def resolved(items: Sequence[Any], known: Mapping[str, Any]) -> list[Any]:
    """Return the items, with each reference replaced by the item that it refers to.

    Args:
        known: items by their ids.

    Raises:
        HttpError: a reference refers to an item that is not known.
    """
    return [
        _referred(item, known, f"input[{i}]") if _kind(item) == "item_reference" else item
        for i, item in enumerate(items)
    ]


def _referred(item: Mapping[str, Any], known: Mapping[str, Any], where: str) -> Any:
    name = item.get("id")
    if not isinstance(name, str) or name not in known:
        why = (
            f"{where} refers to the item {shown(name)}, which is not stored here (any more): send the item itself, "
            "as the response that had it gave it"
        )
        raise HttpError(404, why, param=where, code="item_not_found")
    return known[name]


def messages_of(before: Sequence[Any], items: Sequence[Any], instructions: str | None) -> list[dict[str, Any]]:
    """Return the messages of a conversation.

    Text and calls that follow each other become one message, with the reasoning before them.

    Args:
        before: the items of earlier turns.
        items: the items of this request.
        instructions: a system message for this request; None: there is none.

    Raises:
        RequestError: an item can't be read.
    """
    messages: list[dict[str, Any]] = []
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    reasoning = ""
    places = [f"previous_response_id, item {i}" for i in range(len(before))]
    places += [f"input[{i}]" for i in range(len(items))]
    for item, where in zip([*before, *items], places, strict=True):
        if _kind(item) == "reasoning":
            reasoning = _reasoning_text(item, where)
            continue
        message = _message(item, where)
        if reasoning and message["role"] == "assistant":
            message["reasoning_content"] = reasoning
        reasoning = ""
        last = messages[-1] if messages else {}
        if "tool_calls" in message and last.get("role") == "assistant":
            last.setdefault("tool_calls", []).extend(message["tool_calls"])
        else:
            messages.append(message)
    return messages


def stored_form(items: Sequence[Any]) -> list[dict[str, Any]]:
    """Return items as they are stored and listed: each has an id, and messages have parts."""
    return [_stored_item(item) for item in items]


def _stored_item(item: Mapping[str, Any]) -> dict[str, Any]:
    kind = _kind(item) or "message"
    name = item.get("id")
    found = {**item, "type": kind, "id": name if isinstance(name, str) else new_id(_NAMES[kind])}
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
                raise RequestError.about(
                    f"{where}.role", f"must be a string such as user, got {shown(item.get('role'))}"
                )
            return {"role": item["role"], "content": _content(item.get("content"), f"{where}.content")}
        case "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            return {"role": "assistant", "content": "", "tool_calls": [call]}
        case "function_call_output":
            content = _content(item.get("output"), f"{where}.output")
            return {"role": "tool", "tool_call_id": item.get("call_id"), "content": content}
    raise RequestError.about(where, f"must be {_KINDS}, got {shown(kind or item)}")


def _content(content: Any, where: str) -> Any:
    if not isinstance(content, list):
        return content
    found = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in _TEXTS:
            why = f": parts of type {shown(kind)} can't be read; this engine takes text"
            raise RequestError.about(f"{where}[{i}]", why)
        found.append({"type": "text", "text": part.get("text")})
    return found


def _reasoning_text(item: Mapping[str, Any], where: str) -> str:
    """Return the text of a reasoning item, for templates that show it: its content, or else its summary.

    Encrypted content is ignored.
    """
    for name in ("content", "summary"):
        parts = item.get(name) or []
        if not isinstance(parts, list) or not all(_is_text(part) for part in parts):
            raise RequestError.about(f"{where}.{name}", f"must be a list of parts with a text, got {shown(parts)}")
        if parts:
            return "\n".join(part["text"] for part in parts)
    return ""


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("text"), str)
