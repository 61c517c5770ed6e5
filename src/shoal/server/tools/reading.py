"""A tool call in JSON, read while it is being written."""

import json
import re
from dataclasses import dataclass
from typing import Any

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*')


@dataclass(frozen=True, slots=True)
class Start:
    """A call begins."""

    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of the arguments, which are JSON in a text, of the call that began last."""

    text: str


Piece = str | Start | Arguments  # a text is content: no part of a call


class Brackets:
    """Knows where in JSON a text is: how deep, and whether within a string. `quotes`: what strings stand in."""

    def __init__(self, quotes: str = '"') -> None:
        self.depth = 0
        self._quotes = quotes
        self._string = ""  # the quote it began with
        self._escaped = False

    def step(self, character: str) -> bool:
        """Reads a character. Is it a bracket, outside of strings?"""
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
    """One object: `{"name": ..., "arguments": {...}}`, or with `parameters` instead; with a `name` given, the arguments
    alone. Where the name stands in front, the arguments are handed out as they come, else all at once in the end.
    """

    def __init__(self, name: str | None = None) -> None:
        self.done = False
        self.begun = False  # a Start was handed out
        self.text = ""  # what was read
        self._brackets = Brackets()
        self._name = name
        self._outer = 0 if name is not None else 1  # how deep the arguments' object lies
        self._passing = False  # it is in the arguments
        self._passed = False  # they have ended, and so may the object, or another of its keys come

    def feed(self, text: str) -> tuple[list[Piece], str]:
        """What is certain now, and what stands behind the object. An object that is no call is content."""
        found: list[Piece] = []
        begin = 0  # of the arguments in this text
        for at, character in enumerate(text):
            if self._passed and not character.isspace():
                self._passed = False
                if character not in ",}":  # the model has forgotten the object's end
                    self.text += text[:at]
                    self.done = True
                    return found, text[at:]
            if not self._brackets.step(character):
                continue
            depth = self._brackets.depth
            if not self.begun and character == "{" and depth == self._outer + 1:
                name = self._name if self._outer == 0 else _name_in(self.text + text[:at])
                if name is not None:
                    found.append(Start(name))
                    self.begun, self._passing, begin = True, True, at
            elif self._passing and depth == self._outer:
                found.append(Arguments(text[begin : at + 1]))
                self._passing = False
                self._passed = self._outer == 1
            if depth <= 0:
                self.text += text[: at + 1]
                self.done = True
                return (found if self.begun else _whole(self.text)), text[at + 1 :]
        if self._passing and begin < len(text):
            found.append(Arguments(text[begin:]))
        self.text += text
        return found, ""


def _name_in(head: str) -> str | None:
    match = _HEAD.fullmatch(head)
    try:
        return json.loads(match[1], strict=False) if match else None
    except ValueError:
        return None


def _whole(text: str) -> list[Piece]:
    try:
        call = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return [text]
    name = call.get("name") if isinstance(call, dict) else None
    if not isinstance(name, str):
        return [text]
    if not call.keys() & {"arguments", "parameters"} and not call.keys() <= {"name", "id", "type"}:
        return [text]  # an answer in JSON that has a name in it
    arguments = _object(call.get("arguments", call.get("parameters")))
    if arguments is None:
        return [text]
    return [Start(name), Arguments(json.dumps(arguments, ensure_ascii=False))]


def _object(arguments: object) -> dict[str, Any] | None:
    """As models write it, in JSON or in a text that holds JSON; nothing is no arguments. None: it is no object."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments, strict=False) if arguments.strip() else None
        except (ValueError, RecursionError):
            return None
    if arguments is None:
        return {}
    return arguments if isinstance(arguments, dict) else None
