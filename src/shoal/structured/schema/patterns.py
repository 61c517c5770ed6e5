"""Regular expressions of JSON schemas, which are JavaScript's (ECMA-262), in the words of llguidance's library.

The two read most patterns alike, and some not: in a class `[` and `&&` are operators of one of them, `.` and `\\s` mean
different sets, and one has look-around, word boundaries and back-references, which no automaton has.
"""

import re

_SPACE = r"\t\n\x0b\x0c\r \xa0\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}\x{feff}"
_SETS = {"d": "0-9", "w": "A-Za-z0-9_", "s": _SPACE}
_CONTROLS = {"t": 9, "n": 10, "v": 11, "f": 12, "r": 13, "0": 0}
_ANYTHING = r"[^\n\r\x{2028}\x{2029}]"
_QUANTIFIER = re.compile(r"[*+?]|\{(\d+)(,(\d*))?\}", re.ASCII)
_PROPERTY = re.compile(r"\{[A-Za-z_]+(=[A-Za-z_]+)?\}")
_MOST_REPEATED = 1 << 31
_MOST_NESTED = 200
_DECIMAL = r"^(?!^[-+.]*$)[+-]?0*"  # what pydantic writes for a Decimal begins so


class NotRegular(Exception):
    """No automaton can match it."""


def translated(pattern: str) -> str:
    """
    Raises:
        ValueError: it is no regular expression.
        NotRegular: it is one that can't be obeyed.
    """
    if pattern.startswith(_DECIMAL):
        return _decimal(pattern.removeprefix(_DECIMAL))
    return _Translation(pattern).run()


class _Translation:
    def __init__(self, pattern: str) -> None:
        self._text = pattern
        self._at = 0
        self._out: list[str] = []
        self._open = 0  # groups
        self._atom = False  # there is something that a quantifier may follow
        self._start = True  # nothing is before this, in any way to come here
        self._starts: list[bool] = []  # the same, where each open group begins

    def run(self) -> str:
        while self._at < len(self._text):
            self._step()
        if self._open:
            raise ValueError("unclosed group")
        return "".join(self._out)

    def _step(self) -> None:
        char = self._text[self._at]
        match char:
            case "\\":
                self._put(self._escape(inside=False))
            case "[":
                self._put(self._class())
            case "(":
                self._group()
            case ")":
                self._close()
            case "|":
                self._at += 1
                self._out.append("|")
                self._start, self._atom = self._starts[-1] if self._starts else True, False
            case "^" | "$":
                self._anchor(char)
            case ".":
                self._at += 1
                self._put(_ANYTHING)
            case "*" | "+" | "?" | "{":
                self._quantifier()
            case _:
                self._at += 1
                self._put(_literal(ord(char)))

    def _put(self, text: str) -> None:
        self._out.append(text)
        self._atom, self._start = True, False

    def _group(self) -> None:
        rest = self._text[self._at :]
        named = re.match(r"\(\?<[A-Za-z_$][\w$]*>", rest)
        if rest.startswith(("(?=", "(?!", "(?<=", "(?<!")):
            raise NotRegular("look-around")
        if rest.startswith("(?") and not rest.startswith("(?:") and not named:
            raise NotRegular("a flag or an unknown kind of group")
        self._at += len(named[0]) if named else 3 if rest.startswith("(?:") else 1
        self._open += 1
        if self._open > _MOST_NESTED:
            raise NotRegular(f"groups nested deeper than {_MOST_NESTED}")
        self._starts.append(self._start)
        self._out.append("(?:")
        self._atom = False

    def _close(self) -> None:
        if not self._open:
            raise ValueError("unopened group")
        self._at += 1
        self._open -= 1
        self._starts.pop()
        self._put(")")

    def _anchor(self, char: str) -> None:
        """At an end of the text, where the library takes them."""
        self._at += 1
        if char == "^" and not self._start:
            raise NotRegular("^ behind other text")
        if char == "$" and self._text[self._at :].lstrip(")").startswith("|") and self._open:
            raise NotRegular("$ inside of a group")
        if char == "$" and self._text[self._at :].lstrip(")") and self._text[self._at] != "|":
            raise NotRegular("$ before other text")
        self._out.append(char)
        self._atom = False
        self._start = self._start and char == "^"

    def _quantifier(self) -> None:
        found = _QUANTIFIER.match(self._text, self._at)
        if found is None:  # a brace that is only a brace
            self._at += 1
            self._put(_literal(ord("{")))
            return
        if not self._atom:
            raise ValueError("nothing to repeat")
        least, most = int(found[1] or 0), int(found[3] or found[1] or 0)
        if max(least, most) >= _MOST_REPEATED:
            raise NotRegular("too many repetitions")
        if found[3] and least > most:
            raise ValueError("the numbers of a repetition are the wrong way round")
        self._out.append(found[0])
        self._at = found.end()
        if self._text[self._at : self._at + 1] == "?":  # lazy: what matches is the same
            self._at += 1
        self._atom = False

    def _escape(self, *, inside: bool) -> str:
        """Of a character or a set. `inside`: of a class."""
        code, name = self._code_of_escape(inside)
        if code is not None:
            return _in_class(code) if inside else _literal(code)
        if name in "dws":
            return _SETS[name] if inside else f"[{_SETS[name]}]"
        if name in "DWS":
            return f"[^{_SETS[name.lower()]}]"
        found = _PROPERTY.match(self._text, self._at)
        if found is None:
            raise NotRegular("\\p without the name of a property")
        self._at = found.end()
        return f"\\{name}{found[0]}"

    def _code_of_escape(self, inside: bool) -> tuple[int | None, str]:
        """The character that an escape stands for, or the name of its set."""
        name = self._text[self._at + 1 : self._at + 2]
        if not name:
            raise ValueError("a backslash at the end")
        self._at += 2
        if name in _CONTROLS and not (name == "0" and self._text[self._at : self._at + 1].isdigit()):
            return _CONTROLS[name], ""
        if name in "xu":
            return self._hexadecimal(name), ""
        if name == "c" and re.match("[A-Za-z]", self._text[self._at : self._at + 1]):
            self._at += 1
            return ord(self._text[self._at - 1]) % 32, ""
        if name == "b" and inside:
            return 8, ""
        if name in "dwsDWSpP":
            return None, name
        if name.isalnum() and name.isascii():
            what = "a word boundary" if name in "bB" else "a back-reference" if name in "123456789k" else f"\\{name}"
            raise NotRegular(what)
        return ord(name), ""

    def _hexadecimal(self, name: str) -> int:
        found = re.compile(r"[0-9A-Fa-f]{2}" if name == "x" else r"\{([0-9A-Fa-f]{1,6})\}|[0-9A-Fa-f]{4}").match(
            self._text, self._at
        )
        if found is None:
            raise NotRegular(f"\\{name} without digits")
        self._at = found.end()
        code = int(found[found.lastindex or 0], 16)
        low = re.compile(r"\\u([Dd][C-Fc-f][0-9A-Fa-f]{2})").match(self._text, self._at)
        if 0xD800 <= code < 0xDC00 and low is not None:
            self._at = low.end()
            return 0x10000 + ((code - 0xD800) << 10) + int(low[1], 16) - 0xDC00
        if 0xD800 <= code < 0xE000 or code > 0x10FFFF:
            raise NotRegular("half of a character")
        return code

    def _class(self) -> str:
        self._at += 1
        negated = self._text.startswith("^", self._at)
        self._at += negated
        found: list[str] = []
        while not self._text.startswith("]", self._at):
            if self._at >= len(self._text):
                raise ValueError("unclosed character class")
            found.append(self._member())
        self._at += 1
        if not found and not negated:
            raise NotRegular("an empty class")
        return f"[{'^' if negated else ''}{''.join(found)}]" if found else "(?s:.)"

    def _member(self) -> str:
        first = self._one()
        if not self._text.startswith("-", self._at) or self._text[self._at + 1 : self._at + 2] in ("]", ""):
            return first if isinstance(first, str) else _in_class(first)
        if isinstance(first, str):
            return first
        self._at += 1
        last = self._one()
        if isinstance(last, str):
            return f"{_in_class(first)}{_in_class(ord('-'))}{last}"
        if first > last:
            raise ValueError("a range of a class is the wrong way round")
        return f"{_in_class(first)}-{_in_class(last)}"

    def _one(self) -> int | str:
        """A character of a class, or a set."""
        if self._text[self._at] != "\\":
            self._at += 1
            return ord(self._text[self._at - 1])
        before = self._at
        code, _ = self._code_of_escape(inside=True)
        if code is not None:
            return code
        self._at = before
        return self._escape(inside=True)


def _literal(code: int) -> str:
    char = chr(code)
    return char if char.isalnum() and char.isascii() else f"\\x{{{code:x}}}"


def _in_class(code: int) -> str:
    return _literal(code)


def _decimal(rest: str) -> str:
    """Pydantic's pattern for a Decimal, of whose forms each has a look-ahead."""
    if rest == r"\d*\.?\d*$":
        return r"^[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)$"
    if found := re.fullmatch(r"\\d\*\\\.\?\\d\{0,(\d+)\}0\*\$", rest):
        places = int(found[1])
        return rf"^[+-]?(?:[0-9]+(?:\.[0-9]{{0,{places}}}0*)?|{_fraction(places)})$"
    both = re.fullmatch(
        r"\(\?:\\d\{0,(\d+)\}\|\(\?=\[\\d\.\]\{1,(\d+)\}0\*\$\)\\d\{0,(\d+)\}\\\.\\d\{0,(\d+)\}0\*\$\)", rest
    )
    if both and both[1] == both[3]:
        whole, places = int(both[1]), min(int(both[4]), int(both[2]) - 1)
        return rf"^[+-]?(?:{_whole(whole)}(?:\.[0-9]{{0,{places}}}0*)?|{_fraction(places)})$"
    digits = re.fullmatch(r"\(\?:\\d\{0,(\d+)\}\|\(\?=\[\\d\.\]\{1,(\d+)\}0\*\$\)\\d\*\\\.\\d\*0\*\$\)", rest)
    if digits and int(digits[1]) + 1 == int(digits[2]) <= 60:
        most = int(digits[1])
        split = [rf"{_whole(i)}\.[0-9]{{0,{most - i}}}0*" for i in range(most + 1)]
        return rf"^[+-]?(?:{'|'.join([_whole(most), *split, _fraction(most)])})$"
    raise NotRegular("look-around")


def _whole(most: int) -> str:
    """At least one digit, of which `most` count."""
    return rf"(?:0*[0-9]{{1,{most}}}|0+)" if most else "0+"


def _fraction(most: int) -> str:
    return rf"\.(?:[0-9]{{1,{most}}}0*|0+)" if most else r"\.0+"


_PIECE = re.compile(r"\[(\^?)((?:\\x\{[0-9a-f]+\}|\\.|[^\]\\])*)\]|\\x\{([0-9a-f]+)\}|([A-Za-z0-9])")
_RANGE = re.compile(r"(\\x\{[0-9a-f]+\}|[^\\])(?:-(\\x\{[0-9a-f]+\}|[^\\]))?")


def disjoint(one: str, other: str) -> bool:
    """Whether no text matches two patterns in the library's words, as far as the characters that they begin with say:
    each is anchored, and at some place they have none in common."""
    return any(
        all(high < low or last < first for first, high in mine for low, last in yours)
        for mine, yours in zip(_beginning(one), _beginning(other), strict=False)
    )


def _beginning(pattern: str) -> list[list[tuple[int, int]]]:
    """The ranges of characters that a text that matches has at its first places."""
    if not pattern.startswith("^") or "|" in pattern:
        return []
    found: list[list[tuple[int, int]]] = []
    at = 1
    while piece := _PIECE.match(pattern, at):
        at = piece.end()
        repeated = pattern[at : at + 1] in ("*", "?", "{")
        if repeated or piece[1] or (piece[2] is not None and re.search(r"\\[^x]", piece[2])):
            break
        if piece[2] is not None:
            ends = [(_code(low), _code(high or low)) for low, high in _RANGE.findall(piece[2])]
        else:
            ends = [(_code(piece[0]),) * 2]
        found.append(ends)
        if pattern[at : at + 1] == "+":
            break
    return found


def _code(text: str) -> int:
    return int(text[3:-1], 16) if text.startswith("\\x{") else ord(text)
