"""Reading one tool call, as JSON, while the model is writing it."""

import json
import re
from dataclasses import dataclass
from typing import Any

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*')


@dataclass(frozen=True, slots=True)
class Start:
    """The beginning of a call."""

    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of the arguments of the call that began last, as a part of a JSON text."""

    text: str


Piece = str | Start | Arguments  # a `str` is content, outside of any call


class Brackets:
    """A position in a JSON text: how many brackets are open, and whether it is inside a string.

    Args:
        quotes: the characters that begin and end strings.
    """

    def __init__(self, quotes: str = '"') -> None:
        self.depth = 0
        self._quotes = quotes
        self._string = ""  # the quote that began the string; "" outside of strings
        self._escaped = False

    def step(self, character: str) -> bool:
        """Read one character. Return True if it is a bracket outside of strings."""
        if self._string:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == self._string:
                self._string = ""
            return False
        if character in self._quotes:
            self._string = character
        elif character in "{[(":
            self.depth += 1
            return True
        elif character in "}])":
            self.depth -= 1
            return True
        return False


class CallReader:
    """Reads one object such as `{"name": ..., "arguments": {...}}`, where `parameters` may stand for `arguments`.

    If the name comes first, the arguments are given out as they come, else all together at the end.

    Args:
        name: the name of the function, if it is known: then the object is the arguments alone.
    """

    def __init__(self, name: str | None = None) -> None:
        self.done = False
        self.begun = False  # a Start was given out
        self.text = ""  # what was read so far
        self._brackets = Brackets()
        self._name = name
        self._outer_depth = 0 if name is not None else 1  # the depth outside of the arguments
        self._in_arguments = False
        self._after_arguments = False  # the object may end here, or go on with another key

    def feed(self, text: str) -> tuple[list[Piece], str]:
        """Read more text. Return the pieces that are certain now, and the text after the object.

        An object that is not a call becomes content.
        """
        pieces: list[Piece] = []
        begin = 0  # of the arguments in this text
        for at, character in enumerate(text):
            if self._after_arguments and not character.isspace():
                self._after_arguments = False
                if character not in ",}":  # the model has forgotten to close the object
                    self.text += text[:at]
                    self.done = True
                    return pieces, text[at:]
            if not self._brackets.step(character):
                continue
            depth = self._brackets.depth
            if not self.begun and character == "{" and depth == self._outer_depth + 1:
                name = self._name if self._outer_depth == 0 else _name_in(self.text + text[:at])
                if name is not None:
                    pieces.append(Start(name))
                    self.begun, self._in_arguments, begin = True, True, at
            elif self._in_arguments and depth == self._outer_depth:
                pieces.append(Arguments(text[begin : at + 1]))
                self._in_arguments = False
                self._after_arguments = self._outer_depth == 1
            if depth <= 0:
                self.text += text[: at + 1]
                self.done = True
                return (pieces if self.begun else _whole_call(self.text)), text[at + 1 :]
        if self._in_arguments and begin < len(text):
            pieces.append(Arguments(text[begin:]))
        self.text += text
        return pieces, ""


def _name_in(head: str) -> str | None:
    """Return the name in the text before the arguments; None if there is something else."""
    match = _HEAD.fullmatch(head)
    try:
        return json.loads(match[1], strict=False) if match else None
    except ValueError:
        return None


def _whole_call(text: str) -> list[Piece]:
    """Return the pieces of a whole object: a call, or content if it is not one."""
    try:
        call = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return [text]
    name = call.get("name") if isinstance(call, dict) else None
    if not isinstance(name, str):
        return [text]
    if not call.keys() & {"arguments", "parameters"} and not call.keys() <= {"name", "id", "type"}:
        return [text]  # an answer in JSON that happens to have a name
    arguments = _read_arguments(call.get("arguments", call.get("parameters")))
    if arguments is None:
        return [text]
    return [Start(name), Arguments(json.dumps(arguments, ensure_ascii=False))]


def _read_arguments(arguments: object) -> dict[str, Any] | None:
    """Return arguments that a model wrote, as an object or as a string with JSON; None if they are not an object."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments, strict=False) if arguments.strip() else None
        except (ValueError, RecursionError):
            return None
    if arguments is None:
        return {}
    return arguments if isinstance(arguments, dict) else None
