"""Structured outputs: which texts their grammars allow, and which parameters are refused."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

import shoal
from shoal.errors import RequestError
from shoal.params import StructuredOutputsParams
from shoal.structured.matcher import GrammarState, Vocabulary
from shoal.text.structured_outputs import grammar_text
from support.fakes import steady

TOKENIZER = (Path(shoal.__file__).parent / "demo_model" / "tokenizer.json").read_text("utf-8")
EOS = (1, 5)
VOCAB_SIZE = 640


@cache
def vocabulary() -> Vocabulary:
    return Vocabulary(TOKENIZER, EOS, VOCAB_SIZE)


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_str(TOKENIZER)


def compiled(**kind: Any) -> GrammarState:
    return GrammarState.compile(grammar_text(StructuredOutputsParams(**kind)).text, vocabulary())


def allows(grammar: GrammarState, text: str) -> bool:
    """Return whether the grammar allows this text and an end-of-text token after it."""
    tokens = (*tokenizer().encode(text, add_special_tokens=False).ids, EOS[0])
    return grammar.count_valid(tokens) == len(tokens)


def begins(grammar: GrammarState, text: str) -> bool:
    tokens = tokenizer().encode(text, add_special_tokens=False).ids
    return grammar.count_valid(tokens) == len(tokens)


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_a_schema_is_obeyed_as_an_object_and_as_text() -> None:
    for schema in (PERSON, json.dumps(PERSON), MappingProxyType(PERSON)):
        grammar = compiled(json=schema)
        assert allows(grammar, '{"name": "Ann", "age": 7}')
        assert not allows(grammar, '{"name": "Ann"}')
        assert not allows(grammar, '{"name": "Ann", "age": -7}')


def test_equal_parameters_give_equal_texts() -> None:
    assert grammar_text(StructuredOutputsParams(json=PERSON)) == grammar_text(
        StructuredOutputsParams(json=json.dumps(PERSON, indent=4))
    )


@pytest.mark.parametrize("indent", [None, 0, 2, 4, "\t"])
@pytest.mark.parametrize("value", [{"a": [1, 2, {"b": []}], "c": {}}, {}])
def test_json_may_be_indented_in_the_usual_ways(indent: int | str | None, value: Mapping[str, Any]) -> None:
    grammar = compiled(json_object=True)
    assert allows(grammar, json.dumps(value, indent=indent))
    assert allows(grammar, json.dumps(value, indent=indent, separators=(",", ":")))


@pytest.mark.parametrize("char", " \t\n\r")
def test_the_length_of_whitespace_is_limited(char: str) -> None:
    grammar = compiled(json_object=True)
    assert begins(grammar, "{" + char * 33)
    assert not begins(grammar, "{" + char * 34)
    assert not begins(grammar, '{"a":1}' + char)
    assert not begins(grammar, char)


def test_json_object_allows_any_object_and_nothing_else() -> None:
    grammar = compiled(json_object=True)
    assert allows(grammar, '{"a": [null, true, "x\\n", 1.5e3]}')
    assert not begins(grammar, "[")
    assert not begins(grammar, "1")


def test_a_regex_is_matched_as_a_whole() -> None:
    for pattern in ("[a-c]+/x", "^[a-c]+/x$"):
        grammar = compiled(regex=pattern)
        assert allows(grammar, "abc/x")
        assert not allows(grammar, "abc/xx")
        assert not begins(grammar, "^")


def test_a_rule_of_a_grammar_may_contain_itself() -> None:
    grammar = compiled(grammar='start: "(" start ")" | "x"')
    assert allows(grammar, "((x))")
    assert not allows(grammar, "((x)")


CHOICES = [
    "a",
    "ab",
    '"q"',
    "back\\slash",
    "new\nline",
    "日本",
    "😀",
    "nul\0x",
    "a/b",
    "[x]*",
    "  sp ",
    "\x7f%",
    "'",
    "|",
]


def test_texts_of_a_choice_may_have_any_characters() -> None:
    grammar = compiled(choice=CHOICES)
    for text in CHOICES:
        assert allows(grammar, text), text
    for other in ("", "b", "abc", "new line", "xx", "aa"):
        assert not allows(grammar, other), other


@steady
@given(st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=5), st.text(max_size=6))
def test_a_choice_allows_exactly_its_texts(choice: list[str], other: str) -> None:
    grammar = compiled(choice=choice)
    assert all(allows(grammar, text) for text in choice)
    assert allows(grammar, other) == (other in choice)


def test_a_choice_may_have_thousands_of_texts() -> None:
    grammar = compiled(choice=[f"choice {i}" for i in range(5000)])
    assert allows(grammar, "choice 4999")
    assert not begins(grammar, "choice 5000")


NODE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}
LIST = {"type": "array", "items": {"$ref": "#/$defs/node"}}


def rooted(node: Any) -> dict[str, Any]:
    return {"$ref": "#/$defs/node", "$defs": {"node": node}}


@pytest.mark.parametrize(
    "node",
    [
        NODE,  # the field `next` may be left out
        NODE | {"required": ["next"], "properties": {"next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}}},
        LIST,  # a list may be empty
    ],
)
def test_a_schema_may_refer_to_itself(node: dict[str, Any]) -> None:
    assert begins(compiled(json=rooted(node)), "{" if node["type"] == "object" else "[")


@pytest.mark.parametrize(
    "schema",
    [
        rooted(NODE | {"required": ["next"]}),
        rooted(LIST | {"minItems": 1}),
        rooted({"allOf": [{"$ref": "#/$defs/node"}]}),
        {
            "$ref": "#/$defs/a~1b",
            "$defs": {
                "a/b": {"type": "array", "prefixItems": [{}, {"$ref": "#/$defs/c"}], "minItems": 2},
                "c": {"type": "object", "required": ["d"], "properties": {"d": {"$ref": "#/$defs/a~1b"}}},
            },
        },
    ],
)
def test_a_schema_that_requires_itself_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"structured_outputs\.json .*no text satisfies .* without end"):
        grammar_text(StructuredOutputsParams(json=schema))


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ({"json": "{a"}, "structured_outputs.json is not JSON: Expecting"),
        ({"json": '{"minimum": NaN}'}, "structured_outputs.json is not JSON: NaN"),
        ({"json": {"minimum": float("inf")}}, "structured_outputs.json is not JSON"),
        ({"json": {"enum": {1, 2}}}, "structured_outputs.json is not JSON: a value of type set"),
        ({"json": "[" * 100_000}, "structured_outputs.json is nested too deeply (100000 levels, 300 are allowed)"),
        ({"json": deep(400)}, "structured_outputs.json is nested too deeply (800 levels, 300 are allowed)"),
        ({"json": "[]"}, "structured_outputs.json must be a JSON schema"),
        ({"json": "false"}, "no text satisfies the schema"),
        ({"json": {"type": "integer", "minimum": 3, "maximum": 2}}, "no text satisfies the schema"),
        ({"json": {"enum": []}}, "no text satisfies the schema"),
        ({"json": {"type": "text"}}, "structured_outputs.json: type at # must be one of"),
        ({"json": {"type": "array", "uniqueItems": True}, "strict": True}, "uniqueItems at # is not supported"),
        ({"json": {"oneOf": [{"type": "integer"}, {"type": "number"}]}, "strict": True}, "use anyOf"),
        ({"json": {"$ref": "#/$defs/nothing"}}, "/$defs/nothing"),
        ({"json": {"$ref": "https://example.com/schema"}}, "https://example.com/schema"),
        ({"json": {"type": "string", "pattern": "["}}, "unclosed character class"),
        ({"json": {"const": "\ud800"}}, "structured_outputs.json has no UTF-8 form"),
        ({"regex": "(a"}, "unclosed group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": r"(a)\1"}, "backreferences are not supported"),
        ({"regex": "\ud800"}, "structured_outputs.regex has no UTF-8 form"),
        ({"regex": r"[^\s\S]"}, "no text satisfies it"),
        ({"choice": ()}, "structured_outputs.choice needs at least one text"),
        ({"choice": ["\ud800"]}, "structured_outputs"),
        ({"grammar": "start: nothing"}, "nothing"),
        ({"grammar": "hello"}, "Expected"),
        ({"grammar": ""}, "Empty grammar"),
        ({"grammar": "\ud800"}, "structured_outputs.grammar has no UTF-8 form"),
    ],
)
def test_impossible_structured_outputs_are_refused_in_one_line(kind: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError) as caught:
        compiled(**kind)
    message = str(caught.value)
    assert message.startswith("structured_outputs")
    assert reason in message
    assert "\n" not in message
    assert len(message) < 500


@pytest.mark.parametrize(
    "kind", [{"json": PERSON}, {"json": "true"}, {"json": {}}, {"json_object": True}, {"regex": ""}]
)
def test_valid_structured_outputs_are_accepted(kind: dict[str, Any]) -> None:
    compiled(**kind)
