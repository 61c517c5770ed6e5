"""Random schemas, checked with a second implementation of JSON Schema.

Every text that a grammar allows must satisfy its schema, apart from the dropped keywords.
"""

import copy
import json
import random
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import RequestError
from shoal.structured.schema.grammar_json import grammar_json
from shoal.structured.schema.prepare import prepare
from support.fakes import steady
from support.grammars import of_schema, written

PATTERNS = [
    "^a",
    "b$",
    "^[ab]+$",
    "a|b",
    "^a|b$",
    "(^a|b)x",
    r"\d",
    r"^\w+$",
    "[^a]",
    "^[a-c&]$",
    "^.$",
    "a(?=b)",
    "^$",
]
FORMATS = ["date", "uuid", "time", "date-time", "ipv4", "password", "email"]
NUMBERS = [0, 1, 2, -1, 5, 10, 0.5, -2.25, 99.99, 2**53 + 1, -(2**63), 2**63 - 1, 2**64, -(10**25) + 3, 10**15]
VALUES = [1, 2.5, "a", "b", None, True, [1], {"a": 1}, [2**60 + 1], 2**63, 1.0]
TYPES = ["null", "boolean", "integer", "number", "string", "array", "object"]
NAMES = ["a", "b", "k"]

LEAVES = st.sampled_from([True, {}, {"type": "null"}, {"type": "string", "maxLength": 3}, {"$ref": "#/$defs/p"},
                          {"$ref": "#anchor"}, {"type": "boolean"}, {"const": 1}, {"const": 2**60 + 1}])  # fmt: skip
numbers = st.sampled_from(NUMBERS)
values = st.sampled_from(VALUES)


def some(**keywords: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=keywords)


def larger(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    several = st.lists(inner, min_size=1, max_size=2)
    number = some(minimum=numbers, maximum=numbers, exclusiveMinimum=numbers, exclusiveMaximum=numbers,
                  multipleOf=st.sampled_from([1, 2, 0.5, 0.01, 7, 1000]))  # fmt: skip
    string = some(minLength=st.integers(0, 2), maxLength=st.integers(0, 4), pattern=st.sampled_from(PATTERNS),
                  format=st.sampled_from(FORMATS))  # fmt: skip
    array = some(items=inner, prefixItems=several, minItems=st.integers(0, 3), maxItems=st.integers(0, 3),
                 uniqueItems=st.booleans(), contains=inner)  # fmt: skip
    members = st.dictionaries(st.sampled_from(NAMES), inner, max_size=3)
    required = st.lists(st.sampled_from([*NAMES, "x"]), max_size=3, unique=True)
    obj = some(properties=members, required=required, additionalProperties=st.one_of(st.just(False), inner),
               patternProperties=st.dictionaries(st.sampled_from(["^a", "^b", "x"]), inner, max_size=1),
               minProperties=st.integers(0, 2), maxProperties=st.integers(0, 3),
               propertyNames=st.sampled_from([{"enum": ["a", "x"]}, {"pattern": "^a"}]),
               dependentRequired=st.just({"a": ["b"]}))  # fmt: skip
    typed = [
        st.tuples(st.just({"type": name}), keywords).map(lambda pair: pair[0] | pair[1])
        for name, keywords in (("integer", number), ("number", number), ("string", string), ("array", array),
                               ("object", obj), ("object", obj))
    ]  # fmt: skip
    tagged = st.tuples(inner, inner).map(
        lambda two: {"oneOf": [{"type": "object", "properties": {"k": {"const": k}, "a": a}, "required": ["k"]}
                               for k, a in zip("xy", two, strict=True)]}
    )  # fmt: skip
    conditional = st.tuples(inner, inner, st.sampled_from([["k"], []]), st.sampled_from([["k"], []])).map(
        lambda four: {"type": "object", "properties": {"k": {"enum": ["x", "y", 1]}, "a": four[0]},
                      "required": four[2], "if": {"properties": {"k": {"enum": ["x", 1]}}, "required": four[3]},
                      "then": {"required": ["a"]}, "else": four[1]}
    )  # fmt: skip
    mixed = st.tuples(st.lists(st.sampled_from(TYPES), min_size=1, max_size=3, unique=True), number, obj).map(
        lambda three: {"type": three[0], "maxLength": 2, **three[1], **three[2]}
    )
    applied = some(anyOf=several, allOf=several, oneOf=several, enum=st.lists(values, min_size=1, max_size=4),
                   type=st.sampled_from(TYPES), properties=members)  # fmt: skip
    refused = st.sampled_from([{"type": "string"}, {"required": ["a"]}, {"const": 1}]).map(lambda one: {"not": one})
    return st.one_of(*typed, tagged, conditional, mixed, applied, refused)


schemas = st.recursive(LEAVES, larger, max_leaves=8)


def without(schema: dict[str, Any], dropped: tuple[str, ...]) -> dict[str, Any]:
    """Return the schema without the dropped keywords. A dropped `oneOf` still works as an `anyOf`."""
    schema = copy.deepcopy(schema)
    for each in sorted(dropped, key=lambda each: -each.count("/")):
        keyword, _, place = each.rpartition(" at ")
        node: Any = schema
        for step in place.split("/")[1:]:
            node = node[int(step)] if isinstance(node, list) else node[step.replace("~1", "/").replace("~0", "~")]
        name = keyword.split(" ")[0]
        removed = node.pop(name)
        if name == "oneOf":
            node.setdefault("allOf", []).append({"anyOf": removed})
        if name == "patternProperties":
            node.pop("additionalProperties", None)
    return schema


junk = st.sampled_from([None, True, 0, -1, 2.5, 1e308, 10**30, "", "#", "#a", "^(", "\ud800", "urn:x", [], [1], ["a"],
                        [None], {}, {"a": 1}, {"a": ["b"]}, "integer", {"$ref": "#"}, {"propertyName": 5}])  # fmt: skip
words = st.sampled_from([
    "type", "enum", "const", "$ref", "$id", "$anchor", "$dynamicRef", "$recursiveRef", "$schema", "allOf", "anyOf",
    "oneOf", "not", "if", "then", "items", "prefixItems", "contains", "minContains", "maxItems", "uniqueItems",
    "properties", "patternProperties", "additionalProperties", "required", "maxProperties", "propertyNames",
    "dependentRequired", "dependencies", "unevaluatedProperties", "minLength", "pattern", "format", "minimum",
    "exclusiveMaximum", "multipleOf", "nullable", "discriminator", "x-number", "x-guidance", "$defs",
])  # fmt: skip


@pytest.mark.slow
@settings(steady, max_examples=500)
@given(schemas, st.lists(st.tuples(words, junk, st.integers(0, 50)), min_size=1, max_size=4), st.booleans())
def test_invalid_schemas_are_refused_in_one_line(schema: Any, changes: list[tuple[str, Any, int]], text: bool) -> None:
    schema = {"allOf": [copy.deepcopy(schema)], "$defs": {"p": {}, "x": {"$anchor": "anchor"}}}
    for word, value, place in changes:
        parts = [part for part in inside(schema) if isinstance(part, dict)]
        parts[place % len(parts)][word] = copy.deepcopy(value)
    try:
        grammar_json(prepare(json.dumps(schema) if text else schema, strict=False).schema, " ")
    except RequestError as error:
        message = str(error)
        assert message.startswith("structured_outputs.json"), message
        assert "\n" not in message


def inside(value: Any) -> list[Any]:
    """Return a JSON value and all values inside it."""
    below = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value, *(each for part in below for each in inside(part))]


@pytest.mark.slow
@settings(steady, max_examples=300)
@given(schemas, schemas, schemas, st.integers(0, 1000))
def test_texts_that_a_grammar_allows_satisfy_its_schema(root: Any, one: Any, other: Any, seed: int) -> None:
    schema = {**(root if isinstance(root, dict) else {"allOf": [root]})}
    schema["$defs"] = {"p": one, "x": {"anyOf": [other], "$anchor": "anchor"}}
    try:
        dropped = prepare(schema, strict=False).dropped
        grammar = of_schema(schema)
    except RequestError:
        return
    validator = jsonschema_rs.Draft202012Validator(without(schema, dropped), validate_formats=True)
    chance = random.Random(seed)
    for text in [written(grammar, chance) for _ in range(4)]:
        if text is None:
            continue
        value = json.loads(text)
        if "inf" not in repr(value):  # 1e400 is a valid number, but too large for a double
            assert validator.is_valid(value), (text, schema, [error.message for error in validator.iter_errors(value)])
