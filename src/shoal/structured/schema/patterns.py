"""Translating regular expressions of JSON schemas, which are JavaScript's (ECMA-262), to those of Rust and llguidance.

Most patterns mean the same in both. The differences: Rust reads `[` and `&&` in a character class as operators; `.` and
`\\s` mean different sets; and JavaScript has look-around, word boundaries and back-references, which a finite
automaton cannot match.
"""

import re

_SPACE = r"\t\n\x0b\x0c\r \xa0\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}\x{feff}"
_SETS = {"d": "0-9", "w": "A-Za-z0-9_", "s": _SPACE}
_CONTROLS = {"t": 9, "n": 10, "v": 11, "f": 12, "r": 13, "0": 0}
_ANYTHING = r"[^\n\r\x{2028}\x{2029}]"
_QUANTIFIER = re.compile(r"[*+?]|\{(\d+)(,(\d*))?\}", re.ASCII)
_PROPERTY = re.compile(r"\{[A-Za-z_]+(=[A-Za-z_]+)?\}")
_MAX_REPEATED = 1 << 31
_MAX_NESTED = 200
_DECIMAL = r"^(?!^[-+.]*$)[+-]?0*"  # how a pattern that pydantic writes for a Decimal begins


class PatternNotSupported(Exception):
    """A regular expression that the library cannot match; the message names the part that it lacks."""


def translate(pattern: str) -> str:
    """Return a JavaScript pattern in the syntax of the library.

    Raises:
        ValueError: the text is not a regular expression.
        PatternNotSupported: the regular expression cannot be translated.
    """
    if pattern.startswith(_DECIMAL):
        return _decimal(pattern.removeprefix(_DECIMAL))
    return _Translator(pattern).run()


class _Translator:
    def __init__(self, pattern: str) -> None:
        self._text = pattern
        self._at = 0
        self._out: list[str] = []
        self._open = 0  # number of open groups
        self._atom = False  # a quantifier may follow here
        self._at_start = True  # no character can have been matched before this position
        self._group_starts: list[bool] = []  # `_at_start` at the beginning of each open group

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
                self._emit(self._escape(inside=False))
            case "[":
                self._emit(self._class())
            case "(":
                self._group()
            case ")":
                self._close()
            case "|":
                self._at += 1
                self._out.append("|")
                self._at_start, self._atom = self._group_starts[-1] if self._group_starts else True, False
            case "^" | "$":
                self._anchor(char)
            case ".":
                self._at += 1
                self._emit(_ANYTHING)
            case "*" | "+" | "?" | "{":
                self._quantifier()
            case _:
                self._at += 1
                self._emit(_literal(ord(char)))

    def _emit(self, text: str) -> None:
        self._out.append(text)
        self._atom, self._at_start = True, False

    def _group(self) -> None:
        rest = self._text[self._at :]
        named = re.match(r"\(\?<[A-Za-z_$][\w$]*>", rest)
        if rest.startswith(("(?=", "(?!", "(?<=", "(?<!")):
            raise PatternNotSupported("look-around")
        if rest.startswith("(?") and not rest.startswith("(?:") and not named:
            raise PatternNotSupported("a flag or an unknown kind of group")
        self._at += len(named[0]) if named else 3 if rest.startswith("(?:") else 1
        self._open += 1
        if self._open > _MAX_NESTED:
            raise PatternNotSupported(f"groups nested deeper than {_MAX_NESTED}")
        self._group_starts.append(self._at_start)
        self._out.append("(?:")
        self._atom = False

    def _close(self) -> None:
        if not self._open:
            raise ValueError("unopened group")
        self._at += 1
        self._open -= 1
        self._group_starts.pop()
        self._emit(")")

    def _anchor(self, char: str) -> None:
        """Translate `^` or `$`, which the library allows only at the beginning and at the end of a pattern."""
        self._at += 1
        if char == "^" and not self._at_start:
            raise PatternNotSupported("^ after other text")
        if char == "$" and self._text[self._at :].lstrip(")").startswith("|") and self._open:
            raise PatternNotSupported("$ inside a group")
        if char == "$" and self._text[self._at :].lstrip(")") and self._text[self._at] != "|":
            raise PatternNotSupported("$ before other text")
        self._out.append(char)
        self._atom = False
        self._at_start = self._at_start and char == "^"

    def _quantifier(self) -> None:
        found = _QUANTIFIER.match(self._text, self._at)
        if found is None:  # a brace that begins no quantifier stands for itself
            self._at += 1
            self._emit(_literal(ord("{")))
            return
        if not self._atom:
            raise ValueError("nothing to repeat")
        least, most = int(found[1] or 0), int(found[3] or found[1] or 0)
        if max(least, most) >= _MAX_REPEATED:
            raise PatternNotSupported("too many repetitions")
        if found[3] and least > most:
            raise ValueError("the minimum of a repetition is larger than its maximum")
        self._out.append(found[0])
        self._at = found.end()
        if self._text[self._at : self._at + 1] == "?":  # a lazy quantifier matches the same texts
            self._at += 1
        self._atom = False

    def _escape(self, *, inside: bool) -> str:
        """Translate an escape, which stands for a character or a set. `inside`: it is in a character class."""
        code, name = self._code_of_escape(inside)
        if code is not None:
            return _in_class(code) if inside else _literal(code)
        if name in "dws":
            return _SETS[name] if inside else f"[{_SETS[name]}]"
        if name in "DWS":
            return f"[^{_SETS[name.lower()]}]"
        found = _PROPERTY.match(self._text, self._at)
        if found is None:
            raise PatternNotSupported("\\p without the name of a property")
        self._at = found.end()
        return f"\\{name}{found[0]}"

    def _code_of_escape(self, inside: bool) -> tuple[int | None, str]:
        """Read an escape: return the code of the character that it stands for, or None and the name of its set."""
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
            raise PatternNotSupported(what)
        return ord(name), ""

    def _hexadecimal(self, name: str) -> int:
        found = re.compile(r"[0-9A-Fa-f]{2}" if name == "x" else r"\{([0-9A-Fa-f]{1,6})\}|[0-9A-Fa-f]{4}").match(
            self._text, self._at
        )
        if found is None:
            raise PatternNotSupported(f"\\{name} without digits")
        self._at = found.end()
        code = int(found[found.lastindex or 0], 16)
        low = re.compile(r"\\u([Dd][C-Fc-f][0-9A-Fa-f]{2})").match(self._text, self._at)
        if 0xD800 <= code < 0xDC00 and low is not None:
            self._at = low.end()
            return 0x10000 + ((code - 0xD800) << 10) + int(low[1], 16) - 0xDC00
        if 0xD800 <= code < 0xE000 or code > 0x10FFFF:
            raise PatternNotSupported("half of a surrogate pair")
        return code

    def _class(self) -> str:
        self._at += 1
        negated = self._text.startswith("^", self._at)
        self._at += negated
        found: list[str] = []
        while not self._text.startswith("]", self._at):
            if self._at >= len(self._text):
                raise ValueError("unclosed character class")
            found.append(self._class_member())
        self._at += 1
        if not found and not negated:
            raise PatternNotSupported("an empty class")
        return f"[{'^' if negated else ''}{''.join(found)}]" if found else "(?s:.)"

    def _class_member(self) -> str:
        first = self._class_item()
        if not self._text.startswith("-", self._at) or self._text[self._at + 1 : self._at + 2] in ("]", ""):
            return first if isinstance(first, str) else _in_class(first)
        if isinstance(first, str):
            return first
        self._at += 1
        last = self._class_item()
        if isinstance(last, str):
            return f"{_in_class(first)}{_in_class(ord('-'))}{last}"
        if first > last:
            raise ValueError("a range in a character class ends before it begins")
        return f"{_in_class(first)}-{_in_class(last)}"

    def _class_item(self) -> int | str:
        """Read one item of a character class: return the code of a character, or a set in translated form."""
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
    """Translate the rest of a pattern that pydantic writes for a Decimal.

    It has look-aheads, but as its forms are known it can be written without them.
    """
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
    raise PatternNotSupported("look-around")


def _whole(most: int) -> str:
    """Return a pattern for a whole number of at most `most` digits, apart from leading zeros."""
    return rf"(?:0*[0-9]{{1,{most}}}|0+)" if most else "0+"


def _fraction(most: int) -> str:
    return rf"\.(?:[0-9]{{1,{most}}}0*|0+)" if most else r"\.0+"


_PIECE = re.compile(r"\[(\^?)((?:\\x\{[0-9a-f]+\}|\\.|[^\]\\])*)\]|\\x\{([0-9a-f]+)\}|([A-Za-z0-9])")
_RANGE = re.compile(r"(\\x\{[0-9a-f]+\}|[^\\])(?:-(\\x\{[0-9a-f]+\}|[^\\]))?")


def patterns_disjoint(one: str, other: str) -> bool:
    """Return whether no text matches both of two translated patterns, as far as their first characters show.

    That is so if both begin with `^` and, at some position, have no character in common.
    """
    return any(
        all(high < low or last < first for first, high in mine for low, last in yours)
        for mine, yours in zip(_first_ranges(one), _first_ranges(other), strict=False)
    )


def _first_ranges(pattern: str) -> list[list[tuple[int, int]]]:
    """Return, for each of the first positions of a matching text, the ranges of characters that it may have there."""
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
