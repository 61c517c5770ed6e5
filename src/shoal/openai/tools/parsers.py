"""Parsers of the formats in which models write tool calls, as the models' own chat templates show them.

A parser gets the text of an output piece by piece. Its result does not depend on how the text was cut.
"""

import ast
import json
import re
from collections.abc import Callable, Sequence
from typing import Protocol

from shoal.openai.tools.call_reader import Arguments, Brackets, CallReader, Piece, Start


class ToolParser(Protocol):
    def feed(self, text: str) -> list[Piece]:
        """Read more text. Return the pieces that are certain now."""

    def finish(self) -> list[Piece]:
        """Return the rest, at the end of the text."""


class Marked:
    """Calls in JSON after a marker. Text without a marker is content.

    Args:
        marker: begins calls; "": calls are only at the beginning of the text.
        between: texts that may stand before, between and after calls, beside spaces.
        closing: the one of these that ends a call, or all calls. Content begins after it.
        names: True: a call may also be written as its name, followed by the arguments.
    """

    def __init__(self, marker: str, between: Sequence[str] = (), *, closing: str = "", names: bool = False) -> None:
        self._marker = marker
        self._between = [*([marker] if marker else []), *between]
        self._closing = closing
        self._names = names
        # What reads the next text: one of the methods `_read_...`. Each reads what it can of the buffer, and returns
        # False if it needs more text to go on.
        self._read_next = self._read_text if marker else self._read_between
        self._buffer = ""
        self._skipped = ""  # the text since the last call; it becomes content if no call follows
        self._call: CallReader | None = None
        self._has_calls = False
        self._has_content = False
        self._closes = False  # the text that was skipped last comes after a call

    def feed(self, text: str) -> list[Piece]:
        self._buffer += text
        pieces: list[Piece] = []
        while self._buffer and self._read_next(pieces):
            pass
        return pieces

    def finish(self) -> list[Piece]:
        left = self._skipped + self._buffer
        if self._call is not None and not self._call.begun:
            left = self._skipped + self._call.text
        elif self._call is not None or (self._has_calls and not left.strip()):
            left = ""
        if self._closes and self._read_next == self._read_between:  # perhaps half of what closes a call
            left = ""
        return [left] if left else []

    def _read_text(self, pieces: list[Piece]) -> bool:
        """Read content up to a marker."""
        if not self._marker:
            self._add_content(pieces, self._buffer)
            self._buffer = ""
            return False
        before, marker, after = self._buffer.partition(self._marker)
        if not marker:  # spaces before a call are not content, so they wait for what follows
            content = before.rstrip()
            held = _overlap(before, self._marker) or ""
            content = before[: len(before) - len(held)].rstrip() if held else content
            self._buffer = before[len(content) :]
            self._add_content(pieces, content)
            return False
        self._add_content(pieces, before.rstrip())
        self._skipped = before[len(before.rstrip()) :] + marker
        self._closes = False
        self._buffer = after
        self._read_next = self._read_between
        return True

    def _read_between(self, pieces: list[Piece]) -> bool:
        """Read what stands between calls, up to the next call or to content."""
        rest = self._buffer.lstrip()
        self._skip(len(self._buffer) - len(rest))
        if not rest or any(known.startswith(rest) and known != rest for known in self._between):
            return False
        for known in self._between:
            if rest.startswith(known):
                if known == self._marker and self._closes:  # the text that was skipped has closed the call before
                    self._skipped, self._closes = "", False
                self._skip(len(known))
                return True
        if rest[0] == "{":
            self._begin(CallReader())
        elif self._names and self._skipped and re.match(r"[\w.\-]", rest):
            self._read_next = self._read_name
        else:
            self._end_calls(pieces)
        return True

    def _end_calls(self, pieces: list[Piece]) -> None:
        """Go on with content, which begins in the skipped text, after what closed the last call."""
        skipped = self._skipped
        if self._closes and self._closing:
            skipped = skipped.rpartition(self._closing)[2]
        if self._closes and not self._has_content:
            skipped = skipped.lstrip()
        self._add_content(pieces, skipped)
        self._skipped = ""
        self._read_next = self._read_text

    def _read_name(self, pieces: list[Piece]) -> bool:
        head, brace, _ = self._buffer.partition("{")
        name = head.partition("[")[0].strip()
        if re.fullmatch(r"[\w.\-]*", name) is None:
            self._end_calls(pieces)
            return True
        if not brace:
            return False
        self._skip(len(head))
        self._begin(CallReader(name))
        return True

    def _read_object(self, pieces: list[Piece]) -> bool:
        assert self._call is not None
        found, self._buffer = self._call.feed(self._buffer)
        if not self._call.done:
            pieces += found
            return False
        if isinstance(found[0] if found else None, str):  # an object that is not a call
            self._add_content(pieces, self._skipped + self._call.text)
            self._read_next = self._read_text
        else:
            pieces += found
            self._has_calls = self._closes = True
            self._read_next = self._read_between
        self._skipped = ""
        self._call = None
        return True

    def _add_content(self, pieces: list[Piece], text: str) -> None:
        if text:
            pieces.append(text)
            self._has_content = True

    def _skip(self, count: int) -> None:
        self._skipped += self._buffer[:count]
        self._buffer = self._buffer[count:]

    def _begin(self, call: CallReader) -> None:
        self._call = call
        self._read_next = self._read_object


class Pythonic:
    """Calls like `[name(key=value, ...), ...]` with literals of Python. Such a list is the whole of the text."""

    _BEGIN = re.compile(r"\s*\[\s*[A-Za-z_][\w.]*\s*\(")
    _MAY_BEGIN = re.compile(r"\s*(\[\s*([A-Za-z_][\w.]*\s*)?)?")

    def __init__(self) -> None:
        self._buffer = ""
        self._brackets: Brackets | None = None  # of the list; None before the list
        self._over = False  # all text from here on is content
        self._spaces: str | None = None  # after the list; they are content if other text follows
        self._has_calls = False

    def feed(self, text: str) -> list[Piece]:
        if self._over:
            return self._read_content(text)
        if self._brackets is None:
            text = self._buffer + text
            self._buffer = ""
            if self._MAY_BEGIN.fullmatch(text):
                self._buffer = text
                return []
            if not self._BEGIN.match(text):
                self._over = True
                return [text]
            self._brackets = Brackets("\"'")
            text = text.lstrip()
        return self._read_list(self._brackets, text)

    def _read_list(self, brackets: Brackets, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        for at, character in enumerate(text):
            is_bracket = brackets.step(character)
            self._buffer += character
            if not is_bracket or brackets.depth > 1 or character == "[":
                continue
            if brackets.depth == 1 and (call := self._read_call()):
                pieces += call
                continue
            self._over = True
            if brackets.depth == 0 and self._has_calls:
                self._spaces = self._buffer = ""
                return pieces + self._read_content(text[at + 1 :])
            rest, self._buffer = self._buffer + text[at + 1 :], ""  # from here on, this is not a list of calls
            return [*pieces, rest]
        return pieces

    def _read_content(self, text: str) -> list[Piece]:
        if self._spaces is not None:
            text = self._spaces + text
            self._spaces = None if text.strip() else text
            if self._spaces is not None:
                return []
        return [text] if text else []

    def _read_call(self) -> list[Piece]:
        """Return the pieces of the call in the buffer; none if there is no call."""
        text = self._buffer.lstrip("[, \n\t")
        try:
            call = ast.parse(text, mode="eval").body
            if not isinstance(call, ast.Call) or call.args:
                return []
            arguments = {str(each.arg): ast.literal_eval(each.value) for each in call.keywords if each.arg}
            pieces: list[Piece] = [
                Start(ast.unparse(call.func)),
                Arguments(json.dumps(arguments, ensure_ascii=False, allow_nan=False)),
            ]
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
            return []
        self._buffer = ""
        self._has_calls = True
        return pieces

    def finish(self) -> list[Piece]:
        return [self._buffer] if self._buffer.strip(", \n\t[" if self._has_calls else "") else []


class Named:
    """The arguments of one function and nothing else, as a structured output makes them."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._begun = False

    def feed(self, text: str) -> list[Piece]:
        if not text:
            return []
        start: list[Piece] = [] if self._begun else [Start(self._name)]
        self._begun = True
        return [*start, Arguments(text)]

    def finish(self) -> list[Piece]:
        return []


def hermes() -> ToolParser:
    return Marked("<tool_call>", ["</tool_call>"], closing="</tool_call>")


def llama3_json() -> ToolParser:
    return Marked("", ["<|python_tag|>", ";", ","])


def mistral() -> ToolParser:
    return Marked("[TOOL_CALLS]", ["[", "]", ","], closing="]", names=True)


def call_list() -> ToolParser:
    """Return a parser of a JSON list of calls, which a structured output makes if a call is required."""
    return Marked("", ["[", "]", ","], closing="]")


PARSERS: dict[str, Callable[[], ToolParser]] = {
    "hermes": hermes,
    "llama3_json": llama3_json,
    "mistral": mistral,
    "pythonic": Pythonic,
}
WITH_SPECIAL_TOKENS = {"mistral", "hermes"}  # parsers whose markers are special tokens of some models


def _overlap(text: str, marker: str) -> str:
    """Return the end of the text that may be the beginning of the marker."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if text.endswith(marker[:length]):
            return marker[:length]
    return ""
