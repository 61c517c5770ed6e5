"""Chat templates: they turn a conversation into the text form that a model was trained on."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.errors import CheckpointError, RequestError
from shoal.git_lfs import refuse_pointer
from shoal.params import Message
from shoal.text import jinja_sandbox
from shoal.text.tokenizer import read_json
from shoal.values import shown

_DEFAULT = "default"
_TOOL_USE = "tool_use"
# Names that `chat_template_kwargs` may not have: `ChatTemplate.render` sets them.
_OWN_NAMES = {
    "messages",
    "add_generation_prompt",
    "continue_final_message",
    "tools",
    "chat_template",
    "chat_template_kwargs",
}
# A mark after the message that is to be continued, in characters that no text has. Its space shows whether the template
# trims the content of messages.
_END = "\ue000end of the message\ue001"
_MARK = _END + " "


class ChatTemplate:
    """The chat templates of a model, by name."""

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str] | None = None) -> None:
        """Take the templates, and the texts of special tokens by their names, such as `bos_token`."""
        self._templates = dict(templates)
        self._special_tokens = dict(special_tokens or {})

    @classmethod
    def open(cls, folder: Path) -> "ChatTemplate | None":
        """Return the templates of a model folder; None if it has none.

        They are in chat_template.jinja, or else in the field `chat_template` of tokenizer_config.json.

        Raises:
            CheckpointError: a file cannot be read.
        """
        config = read_json(folder / "tokenizer_config.json")
        templates = _from_files(folder) or _from_config(config.get("chat_template"), folder)
        if not templates:
            return None
        if "added_tokens_decoder" not in config:
            config = config | read_json(folder / "special_tokens_map.json")
        return cls(templates, _special_tokens(config))

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Return a conversation as one text. It has the special tokens: encode it without adding them again.

        Args:
            add_generation_prompt: end the text with the beginning of an assistant's turn.
            continue_final_message: let the output continue the last message.
            tools: the functions that the model may call.
            chat_template: another template, or the name of one of the model's templates.
            chat_template_kwargs: variables for the template.

        Raises:
            RequestError: the messages or an option are malformed, or the template refuses them.
        """
        if continue_final_message and add_generation_prompt:
            raise RequestError.about(
                "continue_final_message", "requires add_generation_prompt=False, because the last turn continues"
            )
        if tools is not None and (isinstance(tools, str | Mapping) or not isinstance(tools, Sequence)):
            raise RequestError.about("tools", f"must be a list of objects, got {type(tools).__name__}")
        if chat_template is not None and not isinstance(chat_template, str):
            raise RequestError.about("chat_template", f"must be a string, got {type(chat_template).__name__}")
        own = _check_kwargs(chat_template_kwargs)
        source = self._choose(chat_template, tools)
        template = jinja_sandbox.compile(source)
        checked = check_messages(messages)
        conversation = [_fit_content(_fit_role(message, source), template) for message in checked]
        if continue_final_message:
            _mark(conversation[-1])
        values = {
            **self._special_tokens,
            "messages": conversation,
            "tools": _plain(tools, _Place("tools", "tools")),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **own,
        }
        text = template.render(values)
        return _cut(text) if continue_final_message else text

    def _choose(self, asked: str | None, tools: object) -> str:
        if asked is not None:
            return self._templates.get(asked, asked)
        if tools is not None and _TOOL_USE in self._templates:
            return self._templates[_TOOL_USE]
        if _DEFAULT in self._templates:
            return self._templates[_DEFAULT]
        names = ", ".join(sorted(self._templates)) or "none"
        why = f"the model has no chat template named default; give chat_template; it has {names}"
        raise RequestError(why, "chat_template")


@dataclass(frozen=True, slots=True)
class _Place:
    """A place in the arguments of `ChatTemplate.render`: its name in messages, and as the `param` of an error."""

    name: str
    param: str

    def error(self, problem: str) -> RequestError:
        return RequestError(self.name + problem, self.param)


def check_messages(messages: object) -> list[dict[str, Any]]:
    """Return a copy of messages in plain JSON values, without fields that are null.

    Raises:
        RequestError: it is not a list of messages, each with a role and a text as content; the error names the message.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        why = f"must be a list of objects with role and content, got {type(messages).__name__}"
        raise RequestError.about("messages", why)
    if not messages:
        raise RequestError.about("messages", "is empty: give at least one message")
    return [_check_message(message, _Place(f"message {i}", f"messages[{i}]")) for i, message in enumerate(messages)]


def _check_kwargs(given: object) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise RequestError.about("chat_template_kwargs", f"must be an object of names and values, got {shown(given)}")
    for name in given:
        if name in _OWN_NAMES:
            raise RequestError.about("chat_template_kwargs", f"can't set {name}: it is an argument of its own")
    return {
        str(name): _plain(value, _Place(f"chat_template_kwargs: {name}", "chat_template_kwargs"))
        for name, value in given.items()
    }


def _check_message(message: object, where: _Place) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise where.error(f" must be an object with role and content, got {type(message).__name__}")
    found = {name: value for name, value in _plain(message, where).items() if value is not None}
    if found.get("tool_calls") == []:  # templates would treat it as a turn with calls
        del found["tool_calls"]
        found.setdefault("content", "")
    role = found.get("role")
    if not isinstance(role, str) or not role:
        raise where.error(f": role must be a string such as user, got {role!r}")
    content = found.get("content")
    if isinstance(content, list):
        for i, part in enumerate(content):
            _check_part(part, _Place(f"{where.name}, part {i}", f"{where.param}.content[{i}]"))
    elif content is None:
        if not found.get("tool_calls"):
            raise where.error(" has no content: give a text, or a list of parts of type text")
        found["content"] = ""  # templates fail if it is missing
    elif not isinstance(content, str):
        raise where.error(f": content must be a string or a list of parts, got {type(content).__name__}")
    if "tool_calls" in found:
        found["tool_calls"] = _check_calls(found["tool_calls"], where)
    return found


def _check_part(part: object, where: _Place) -> None:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise where.error(': a part of content must be an object such as {"type": "text", "text": ...}')
    if part["type"] != "text":
        raise where.error(f": parts of type {part['type']} can't be read; this engine takes text")
    if not isinstance(part.get("text"), str):
        raise where.error(f": text of a part must be a string, got {type(part.get('text')).__name__}")


def _check_calls(calls: Any, where: _Place) -> list[Any]:
    """Return tool calls with their arguments as objects, as templates need them. Clients send them as JSON texts."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise where.error(": tool_calls must be a list of objects")
    for call in calls:
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments") or "", str):
            try:
                function["arguments"] = json.loads(function.get("arguments") or "{}", strict=False)
            except (ValueError, RecursionError) as error:
                raise where.error(f": the arguments of a tool call are not valid JSON: {error}") from None
    return calls


def _plain(value: Any, where: _Place) -> Any:
    """Return a copy made of JSON's types, which have no methods that a template could misuse."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {str(key): _plain(item, where) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_plain(item, where) for item in value]
    raise where.error(f": a value of type {type(value).__name__} is not a JSON value")


def _fit_role(message: dict[str, Any], source: str) -> dict[str, Any]:
    """Turn the role `developer` into `system`, if the template does not know it."""
    if message["role"] == "developer" and "developer" not in source:
        return {**message, "role": "system"}
    return message


def _fit_content(message: dict[str, Any], template: jinja_sandbox.Template) -> dict[str, Any]:
    """Return a message with its content in the form that the template reads: a text, or a list of parts."""
    content = message.get("content")
    if isinstance(content, list) and not template.reads_parts:
        return {**message, "content": "\n".join(part["text"] for part in content)}
    if isinstance(content, str) and template.reads_parts and not template.reads_texts:
        return {**message, "content": [{"type": "text", "text": content}]}
    return message


def _mark(message: dict[str, Any]) -> None:
    """Put the mark at the end of a message."""
    content = message.get("content")
    if not content:
        raise RequestError.about("continue_final_message", ": the last message has no content that could be continued")
    if isinstance(content, list):
        content[-1] = {**content[-1], "text": content[-1]["text"] + _MARK}
    else:
        message["content"] = content + _MARK


def _cut(text: str) -> str:
    """Return a rendered text up to the mark."""
    at = text.rfind(_END)
    if at < 0:
        raise RequestError.about("continue_final_message", ": the chat template leaves out the end of the last message")
    return text[:at] if text.startswith(_MARK, at) else text[:at].rstrip()


def _from_files(folder: Path) -> dict[str, str]:
    files = {_DEFAULT: folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    for file in files.values():
        refuse_pointer(file)
    try:
        return {name: file.read_text("utf-8") for name, file in files.items() if file.exists()}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: the chat template can't be read: {error}") from None


def _from_config(value: Any, folder: Path) -> dict[str, str]:
    """Return the templates of a config: its value is one template, or a list of `{"name": ..., "template": ...}`."""
    if value is None or value == "":
        return {}
    entries = [{"name": _DEFAULT, "template": value}] if isinstance(value, str) else value
    try:
        found = {entry["name"]: entry["template"] for entry in entries}
    except (TypeError, KeyError):
        found = {"": None}
    if not all(isinstance(text, str) for pair in found.items() for text in pair):
        file = folder / "tokenizer_config.json"
        raise CheckpointError(f"{file}: chat_template must be a string or a list of objects with name and template")
    return found


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found
