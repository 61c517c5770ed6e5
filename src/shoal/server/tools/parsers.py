"""How models write tool calls. A parser is fed the text as it comes; however the text is cut, the outcome is the same.

The forms are those that the models' own chat templates show.
"""

import ast
import json
import re
from collections.abc import Callable, Sequence
from typing import Protocol

from shoal.server.tools.reading import Arguments, Brackets, CallReader, Piece, Start


class ToolParser(Protocol):
    def feed(self, text: str) -> list[Piece]:
        """What is certain with this text."""

    def finish(self) -> list[Piece]:
        """What is left, at the end of the text."""


class Marked:
    """Calls in JSON behind a marker; a text without one is content.

    Args:
        marker: begins calls; "" where they can only be at the text's beginning.
        between: what may stand before, between and behind calls, beside spaces.
        closing: what of it ends a call or all of them, so that a text behind it begins there.
        names: a call may also be its name, and behind it the arguments.
    """

    def __init__(self, marker: str, between: Sequence[str] = (), *, closing: str = "", names: bool = False) -> None:
        self._marker = marker
        self._between = [*([marker] if marker else []), *between]
        self._closing = closing
        self._names = names
        self._reading = self._text if marker else self._calls  # what the next text is read by
        self._buffer = ""
        self._skipped = ""  # since the last call: content, if none follows
        self._call: CallReader | None = None
        self._found = False  # there was a call
        self._said = False  # there was content
        self._closes = False  # what was skipped last stands behind a call

    def feed(self, text: str) -> list[Piece]:
        self._buffer += text
        found: list[Piece] = []
        while self._buffer and self._reading(found):
            pass
        return found

    def finish(self) -> list[Piece]:
        left = self._skipped + self._buffer
        if self._call is not None and not self._call.begun:
            left = self._skipped + self._call.text
        elif self._call is not None or (self._found and not left.strip()):
            left = ""
        if self._closes and self._reading == self._calls:  # maybe cut in the midst of what closes a call
            left = ""
        return [left] if left else []

    # Each of these reads what it can of the buffer; False if it needs more of the text.

    def _text(self, found: list[Piece]) -> bool:
        if not self._marker:
            self._say(found, self._buffer)
            self._buffer = ""
            return False
        before, marker, behind = self._buffer.partition(self._marker)
        if not marker:  # spaces in front of a call are no content
            shown = before.rstrip()
            held = _overlap(before, self._marker) or ""
            shown = before[: len(before) - len(held)].rstrip() if held else shown
            self._buffer = before[len(shown) :]
            self._say(found, shown)
            return False
        self._say(found, before.rstrip())
        self._skipped = before[len(before.rstrip()) :] + marker
        self._closes = False
        self._buffer = behind
        self._reading = self._calls
        return True

    def _calls(self, found: list[Piece]) -> bool:
        rest = self._buffer.lstrip()
        self._skip(len(self._buffer) - len(rest))
        if not rest or any(known.startswith(rest) and known != rest for known in self._between):
            return False
        for known in self._between:
            if rest.startswith(known):
                if known == self._marker and self._closes:  # what was skipped has closed the call before
                    self._skipped, self._closes = "", False
                self._skip(len(known))
                return True
        if rest[0] == "{":
            self._begin(CallReader())
        elif self._names and self._skipped and re.match(r"[\w.\-]", rest):
            self._reading = self._name
        else:
            self._leave(found)
        return True

    def _leave(self, found: list[Piece]) -> None:
        """What is in the buffer is no call, and nor was what was skipped, but for what closed one."""
        skipped = self._skipped
        if self._closes and self._closing:
            skipped = skipped.rpartition(self._closing)[2]
        if self._closes and not self._said:
            skipped = skipped.lstrip()
        self._say(found, skipped)
        self._skipped = ""
        self._reading = self._text

    def _name(self, found: list[Piece]) -> bool:
        head, brace, _ = self._buffer.partition("{")
        name = head.partition("[")[0].strip()
        if re.fullmatch(r"[\w.\-]*", name) is None:
            self._leave(found)
            return True
        if not brace:
            return False
        self._skip(len(head))
        self._begin(CallReader(name))
        return True

    def _object(self, found: list[Piece]) -> bool:
        assert self._call is not None
        pieces, self._buffer = self._call.feed(self._buffer)
        if not self._call.done:
            found += pieces
            return False
        if isinstance(pieces[0] if pieces else None, str):  # an object, but no call
            self._say(found, self._skipped + self._call.text)
            self._reading = self._text
        else:
            found += pieces
            self._found = self._closes = True
            self._reading = self._calls
        self._skipped = ""
        self._call = None
        return True

    def _say(self, found: list[Piece], text: str) -> None:
        if text:
            found.append(text)
            self._said = True

    def _skip(self, count: int) -> None:
        self._skipped += self._buffer[:count]
        self._buffer = self._buffer[count:]

    def _begin(self, call: CallReader) -> None:
        self._call = call
        self._reading = self._object


class Pythonic:
    """`[name(key=value, ...), ...]`, values being Python's literals, as the whole of the text."""

    _BEGIN = re.compile(r"\s*\[\s*[A-Za-z_][\w.]*\s*\(")
    _MAY_BEGIN = re.compile(r"\s*(\[\s*([A-Za-z_][\w.]*\s*)?)?")

    def __init__(self) -> None:
        self._buffer = ""
        self._brackets: Brackets | None = None  # of the list; None before it
        self._over = False  # what comes is content
        self._spaces: str | None = None  # behind the list: content too, if more than spaces come
        self._found = False

    def feed(self, text: str) -> list[Piece]:
        if self._over:
            return self._content(text)
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
        return self._list(self._brackets, text)

    def _list(self, brackets: Brackets, text: str) -> list[Piece]:
        found: list[Piece] = []
        for at, character in enumerate(text):
            bracket = brackets.step(character)
            self._buffer += character
            if not bracket or brackets.depth > 1 or character == "[":
                continue
            if brackets.depth == 1 and (call := self._call()):
                found += call
                continue
            self._over = True
            if brackets.depth == 0 and self._found:
                self._spaces = self._buffer = ""
                return found + self._content(text[at + 1 :])
            rest, self._buffer = self._buffer + text[at + 1 :], ""  # it is no list of calls, or not from here on
            return [*found, rest]
        return found

    def _content(self, text: str) -> list[Piece]:
        if self._spaces is not None:
            text = self._spaces + text
            self._spaces = None if text.strip() else text
            if self._spaces is not None:
                return []
        return [text] if text else []

    def _call(self) -> list[Piece]:
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
        self._found = True
        return pieces

    def finish(self) -> list[Piece]:
        return [self._buffer] if self._buffer.strip(", \n\t[" if self._found else "") else []


class Named:
    """The arguments of one function, and nothing else: a structured output."""

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


def array() -> ToolParser:
    """A list of calls: what a structured output makes where a call is required."""
    return Marked("", ["[", "]", ","], closing="]")


PARSERS: dict[str, Callable[[], ToolParser]] = {
    "hermes": hermes,
    "llama3_json": llama3_json,
    "mistral": mistral,
    "pythonic": Pythonic,
}
SPECIAL = {"mistral", "hermes"}  # their markers are special tokens of some models, which must be in the text


def _overlap(text: str, marker: str) -> str:
    """The end of the text that may be the beginning of the marker."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if text.endswith(marker[:length]):
            return marker[:length]
    return ""
