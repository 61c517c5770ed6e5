"""Tool calls in the formats of models, read piece by piece or all at once."""

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.openai.tools.call_reader import Arguments, Start
from shoal.openai.tools.parsers import Named, Pythonic, ToolParser, call_list, hermes, llama3_json, mistral
from support.fakes import steady

Call = tuple[str, str]
PARSERS: list[Callable[[], ToolParser]] = [hermes, llama3_json, mistral, call_list, Pythonic, lambda: Named("f")]


def read(parser: ToolParser, pieces: list[str]) -> tuple[str, list[Call]]:
    """Return the content and the calls of a text."""
    content, calls = "", []
    for piece in [each for text in pieces for each in parser.feed(text)] + parser.finish():
        match piece:
            case Start(name):
                calls.append((name, ""))
            case Arguments(text):
                calls[-1] = (calls[-1][0], calls[-1][1] + text)
            case str():
                content += piece
    return content, calls


def cut(text: str, at: list[int]) -> list[str]:
    borders = [0, *sorted({each % (len(text) + 1) for each in at}), len(text)]
    return [text[a:b] for a, b in pairwise(borders)]


@pytest.mark.parametrize(
    ("make", "text", "content", "calls"),
    [
        (hermes, "plain  text ", "plain  text ", []),
        (hermes, 'Hi.\n<tool_call>\n{"name": "f", "arguments": {"a": "}<tool_call>\\""}}\n</tool_call>\n', "Hi.",
         [("f", '{"a": "}<tool_call>\\""}')]),
        (hermes, '<tool_call>{"arguments": {"b": 1}, "name": "g"}</tool_call> <tool_call>{"name": "h"}</tool_call>bye',
         "bye", [("g", '{"b": 1}'), ("h", "{}")]),
        (hermes, "a <tool_ca b <tool_call>x</tool_call> z", "a <tool_ca b <tool_call>x</tool_call> z", []),
        (hermes, 'a <tool_call>{"x": 1} z', 'a <tool_call>{"x": 1} z', []),
        (hermes, '<tool_call>{"name": "f", "arguments": {"a": 1', "", [("f", '{"a": 1')]),
        (hermes, '<tool_call>{"name": "f"', '<tool_call>{"name": "f"', []),
        (hermes, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}', "", [("f", '{"a": 1}')]),
        (llama3_json, '{"name": "f", "parameters": {"a": {"b": [1]}}}; {"name": "g", "parameters": {}}', "",
         [("f", '{"a": {"b": [1]}}'), ("g", "{}")]),
        (llama3_json, '<|python_tag|>{"name": "f", "parameters": {}}', "", [("f", "{}")]),
        (llama3_json, '\n\nHello {"name": "f"}', '\n\nHello {"name": "f"}', []),
        (llama3_json, '{"answer": 5}', '{"answer": 5}', []),
        (llama3_json, '{"name": "Alice", "age": 30}', '{"name": "Alice", "age": 30}', []),
        (llama3_json, '{"name": "f", "parameters": {}}, then', ", then", [("f", "{}")]),
        (hermes, '<tool_call>{"name": "f", "arguments": {"a": 1}\n</tool_call>\n<tool_call>'
         '{"name": "g", "arguments": {}}\n</tool_call>\nafter', "after", [("f", '{"a": 1}'), ("g", "{}")]),
        (hermes, '<tool_call>{"name": "f", "arguments": {}, "id": "x"}</tool_call>', "", [("f", "{}")]),
        (hermes, '<tool_call>{"name": "f", "arguments": {}}\n</tool_call>\n<tool_call>\n{"name": "g',
         '<tool_call>\n{"name": "g', [("f", "{}")]),
        (hermes, '<tool_call>{"name": "f", "arguments": {}}\n</tool_', "", [("f", "{}")]),
        (hermes, '<tool_call>{"name": "f", "arguments": {}}</tool_call> <tool_call>{"nme": "g"}',
         '<tool_call>{"nme": "g"}', [("f", "{}")]),
        (hermes, 'First.\n\n<tool_call>{"name": "f", "arguments": {}}</tool_call>\n\nSecond.', "First.\n\nSecond.",
         [("f", "{}")]),
        (mistral, '[TOOL_CALLS]f{"a": 1}[The end', "[The end", [("f", '{"a": 1}')]),
        (Pythonic, "[f(a=1)]\nnow", "\nnow", [("f", '{"a": 1}')]),
        (Pythonic, "[f(a=1)]\n ", "", [("f", '{"a": 1}')]),
        (Pythonic, "[f(a=1), g(b=foo)] x", ", g(b=foo)] x", [("f", '{"a": 1}')]),
        (mistral, '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]', "",
         [("f", '{"a": 1}'), ("g", "{}")]),
        (mistral, 'ok[TOOL_CALLS]f{"a": 1}[TOOL_CALLS]g[ARGS]{"b":2}', "ok", [("f", '{"a": 1}'), ("g", '{"b":2}')]),
        (mistral, "a list: [1, 2]", "a list: [1, 2]", []),
        (call_list, '[ {"name":"f","parameters":{"a":"]"}} ,\n{"name":"g","parameters":{}} ]', "",
         [("f", '{"a":"]"}'), ("g", "{}")]),
        (Pythonic, "[f(a='x)]', b=[1, -2]), g.h(c={'d': None})]", "",
         [("f", '{"a": "x)]", "b": [1, -2]}'), ("g.h", '{"c": {"d": null}}')]),
        (Pythonic, " [1, 2] or so", " [1, 2] or so", []),
        (Pythonic, "[f(1", "[f(1", []),
        (Pythonic, "[f(x)] no literal", "[f(x)] no literal", []),
        (lambda: Named("f"), '{"a": 1}', "", [("f", '{"a": 1}')]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000])
def test_every_format_of_tool_calls_is_read(
    make: Callable[[], ToolParser], text: str, content: str, calls: list[Call], size: int
) -> None:
    assert read(make(), [text[i : i + size] for i in range(0, len(text), size)]) == (content, calls)


PARTS = [
    "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "[", "]", "{", "}", '"', "\\", ",", ";", ":", " ",
    "\n", '"name"', '"arguments"', "f", "(", ")", "a=", "'", '{"name": "f", "arguments": {"a": 1}}', "é", "1",
    "[f(a=1)", "g(b='x')]", '{"name": "g", "arguments": {}',
]  # fmt: skip


@steady
@given(st.lists(st.sampled_from(PARTS), max_size=14).map("".join), st.lists(st.integers(0, 300), max_size=8))
def test_the_calls_do_not_depend_on_the_pieces_of_the_text(text: str, at: list[int]) -> None:
    for make in PARSERS:
        assert read(make(), cut(text, at)) == read(make(), [text])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
CALLS = st.lists(
    st.tuples(st.from_regex(r"[a-z]{1,8}", fullmatch=True), st.dictionaries(st.text(max_size=4), VALUES, max_size=3)),
    min_size=1,
    max_size=3,
)


@steady
@given(CALLS, st.lists(st.integers(0, 1000), max_size=8), st.booleans())
def test_written_calls_are_read_unchanged(calls: list[tuple[str, Any]], at: list[int], ascii_only: bool) -> None:
    objects = [json.dumps({"name": n, "arguments": a}, ensure_ascii=ascii_only) for n, a in calls]
    for make, text in (
        (hermes, "\n".join(f"<tool_call>\n{each}\n</tool_call>" for each in objects)),
        (llama3_json, "; ".join(objects)),
        (mistral, f"[TOOL_CALLS][{', '.join(objects)}]"),
        (call_list, f"[{','.join(objects)}]"),
    ):
        content, found = read(make(), cut(text, at))
        assert (content, [(name, json.loads(arguments)) for name, arguments in found]) == ("", calls)
