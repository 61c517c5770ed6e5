"""JSON schemas are rewritten so that llguidance obeys them, or refused with the place of the problem."""

import json
import subprocess
import sys
from typing import Any

import pytest

from shoal.errors import RequestError
from shoal.structured.schema.prepare import prepare, summarize_keywords
from support.grammars import allows, of_schema

INT64 = {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}


def check(schema: Any, right: list[str], wrong: list[str]) -> None:
    """Check that no keyword is dropped, and that the grammar allows the right texts and not the wrong ones."""
    grammar = of_schema(schema, strict=True)
    assert {text: allows(grammar, text) for text in [*right, *wrong]} == {
        **dict.fromkeys(right, True),
        **dict.fromkeys(wrong, False),
    }


def test_a_schema_may_be_a_text_or_an_object() -> None:
    for schema in ({"type": "null"}, '{"type": "null"}'):
        check(schema, ["null"], ["1"])
    check("true", ["1", '"a"'], [])


# --- numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"const": 1234567890123456789}, ["1234567890123456789"], ["1234567890123456768", "1234567890123456790"]),
        ({"const": -(2**63)}, [str(-(2**63))], [str(-(2**63) + 1), str(2**63)]),
        ({"const": 2**63}, [str(2**63)], [str(2**63 - 1)]),
        ({"const": 2**53 + 1}, [str(2**53 + 1)], [str(2**53)]),
        ('{"const": 0.12345678901234567}', ["0.12345678901234567"], ["0.12345678901234568"]),
        ('{"const": 1e30}', ["1" + "0" * 30], ["1e30"]),
        ({"const": -0.0}, ["0"], ["1"]),
        ({"const": 1.0, "type": "integer"}, ["1"], ["1.5"]),
        ({"const": {"id": 2**60 + 1, "a": ["x"]}}, [f'{{"id": {2**60 + 1}, "a": ["x"]}}'], ['{"id":1,"a":["x"]}']),
        ({"enum": [1, "a", 2**60 + 1, [2**70]]}, ["1", '"a"', str(2**60 + 1), f"[{2**70}]"], [str(2**60), "2"]),
        ({"type": "integer", "enum": [2**60 + 1, "a", 0.5]}, [str(2**60 + 1)], ['"a"', "0.5"]),
        ({"enum": [2**60, 2**60 + 1], "minimum": 2**60 + 1}, [str(2**60 + 1)], [str(2**60)]),
        (INT64, ["0", "-1", str(-(2**63)), str(2**63 - 1)], [str(2**63), str(-(2**63) - 1), "1.0"]),
        ({"type": "integer", "minimum": 0, "maximum": 2**64 - 1}, ["0", str(2**64 - 1)], ["-1", str(2**64)]),
        ({"type": "integer", "minimum": 10**18}, [str(10**18), "9" * 30], [str(10**18 - 1), "5"]),
        ({"type": "integer", "exclusiveMaximum": -(10**18)}, [str(-(10**18) - 1)], [str(-(10**18)), "0"]),
        ({"type": "number", "maximum": 10**19}, ["-0.5", f"{10**19}.0", "3"], [f"{10**19}.1", str(10**19 + 1)]),
        ({"type": "number", "minimum": -(10**19)}, ["-0.5", "7.5", str(-(10**19))], [f"-{10**19}.1"]),
        ('{"type": "number", "exclusiveMinimum": 1.00000000000000001}', ["1.00000000000000002", "2"], ["1", "1.0"]),
        ({"type": "integer", "minimum": 5, "exclusiveMinimum": True}, ["6"], ["5"]),
        ({"type": "integer", "exclusiveMinimum": 0.5, "maximum": 2.5}, ["1", "2"], ["0", "3"]),
        ({"type": "integer", "multipleOf": 1000000}, ["0", "-2000000"], ["1000", "1500000"]),
        ({"type": "integer", "multipleOf": 0.5}, ["3"], []),
        ({"type": "number", "multipleOf": 0.01}, ["3.25"], ["3.255"]),
        ({"minimum": -(2**63)}, ["null", '"x"', "5", "[1]", '{"a":1}'], [str(-(2**63) - 1)]),
        ({"type": ["integer", "null"], "maximum": 2**64}, ["null", str(2**64)], [str(2**64 + 1), '"a"']),
    ],
)
def test_numbers_of_any_length_are_matched_exactly(schema: Any, right: list[str], wrong: list[str]) -> None:
    check(schema, right, wrong)


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        (
            {"type": "object", "properties": {"a": INT64, "b": {"type": "string"}}, "required": ["a"],
             "additionalProperties": False},
            [f'{{"a": {2**63 - 1}}}', '{"a":1 , "b" : "x"}'],
            [f'{{"a":{2**63}}}', "{}", '{"b":"x"}', '{"b":"x","a":1}', '{"a":1,"c":1}'],
        ),
        (
            {"type": "object", "properties": {"a": INT64, "b": INT64}, "additionalProperties": {"type": "null"}},
            ["{}", '{"b":1}', '{"a":1,"b":2,"c":null,"d":null}', '{"c":null}'],
            [f'{{"b":{2**63}}}', '{"c":1}', '{"\\u0061":null}', '{"a":1,}'],
        ),
        (
            {"type": "array", "prefixItems": [INT64, {"type": "null"}], "items": INT64, "minItems": 1, "maxItems": 3},
            ["[1]", "[1,null]", "[1,null,2]"],
            ["[]", "[null]", f"[1,null,{2**63}]", "[1,null,2,3]"],
        ),
        ({"type": "array", "items": INT64}, ["[]", "[1]", "[1, 2 ,3]"], [f"[{2**63}]", '["a"]']),
        ({"anyOf": [INT64, {"type": "null"}], "default": None}, ["null", "5"], [str(2**63)]),
        (
            {"$ref": "#/$defs/n",
             "$defs": {"n": {"type": "object", "properties": {"v": INT64, "n": {"$ref": "#/$defs/n"}},
                             "required": ["v"], "additionalProperties": False}}},
            ['{"v":1,"n":{"v":2}}'],
            ['{"n":{"v":1}}', f'{{"v":1,"n":{{"v":{2**63}}}}}'],
        ),
    ],
)  # fmt: skip
def test_long_numbers_may_be_anywhere_in_a_schema(schema: Any, right: list[str], wrong: list[str]) -> None:
    check(schema, right, wrong)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ('{"const": 1e400}', "a number in enum or const at # has hundreds of digits"),
        ('{"type": "number", "minimum": 1e-900}', "minimum at # has hundreds of digits"),
        ({"type": "number", "minimum": 10**500}, "minimum at # has hundreds of digits"),
        (
            {"allOf": [{"properties": {"a": INT64}}, {"required": ["a"]}]},
            "a number of more than 15 digits at #/allOf/0",
        ),
        ({"type": "number", "multipleOf": 0}, "multipleOf at # must be above 0, got 0"),
        ({"type": "number", "minimum": "1"}, "minimum at # must be a number, got '1'"),
        ({"type": "integer", "minimum": 2**63, "maximum": 2**63 - 1}, "no text satisfies the schema"),
    ],
)
def test_unsupported_numbers_are_refused(schema: Any, message: str) -> None:
    with pytest.raises(RequestError, match=r"^structured_outputs\.json") as caught:
        of_schema(schema)
    assert message in str(caught.value)


# --- references ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#item", "$defs": {"x": {"$anchor": "item", "type": "null"}}},
        {"$ref": "#/$defs/a~1b~0%25%20c", "$defs": {"a/b~% c": {"type": "null"}}},
        {"$ref": "#/properties/a/prefixItems/1", "properties": {"a": {"prefixItems": [{}, {"type": "null"}]}}},
        {"$id": "http://x.org/y", "$ref": "other#in", "$defs": {"x": {"$id": "other", "$defs": {
            "z": {"$anchor": "in", "type": "null"}}}}},
        {"$id": "http://x.org/y", "$ref": "http://x.org/z", "$defs": {"x": {
            "$id": "/z", "$ref": "#/$defs/q", "$defs": {"q": {"type": "null"}}}}},
        {"$ref": "urn:a:b", "$defs": {"x": {"$id": "urn:a:b", "type": "null"}}},
        {"$dynamicRef": "#n", "$defs": {"x": {"$dynamicAnchor": "n", "type": "null"}}},
        {"$schema": "http://json-schema.org/draft-07/schema#", "$ref": "#x", "type": "string",
         "definitions": {"a": {"$id": "#x", "type": "null"}}},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b", "title": "A"}, "b": {"$ref": "#/$defs/c"},
                                        "c": {"type": "null"}}},
    ],
)  # fmt: skip
def test_references_are_resolved_by_the_rules_of_json_schema(schema: Any) -> None:
    check(schema, ["null"], ["1", '"a"'])


def test_a_schema_may_refer_to_itself_as_a_whole() -> None:
    for name in ("$ref", "$recursiveRef"):
        check({"type": "array", "items": {name: "#"}}, ["[]", "[[],[[]]]"], ["[1]"])


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"$ref": "https://example.com/a"}, "https://example.com/a at # is not in the schema, and nothing is fetched"),
        ({"$ref": "#/nothing"}, "#/nothing at # points to nothing"),
        ({"$ref": "#nothing"}, "#nothing at # names an $anchor that does not exist"),
        ({"$ref": "#/required", "required": ["a"]}, "points to something that is no schema"),
        ({"$ref": 5}, "$ref at # must be a string"),
        ({"$ref": "#"}, "refers to itself without end"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "without end"),
        ({"$dynamicRef": "#n", "$defs": {"x": {"$id": "x", "$dynamicAnchor": "n"}, "y": {"$dynamicAnchor": "n"}}},
         "2 parts with an $id have its anchor"),
    ],
)  # fmt: skip
def test_an_unresolvable_reference_is_refused(schema: Any, message: str) -> None:
    with pytest.raises(RequestError, match=r"^structured_outputs\.json") as caught:
        prepare(schema, strict=False)
    assert message in str(caught.value)


# --- keywords ------------------------------------------------------------------------------------------------------

TAG = {"type": "object", "properties": {"k": {"enum": ["x", "y"]}, "v": {}}, "additionalProperties": False}
IF_X = {"if": {"properties": {"k": {"const": "x"}}, "required": ["k"]}, "then": {"required": ["v"]}}


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"type": "array", "uniqueItems": True, "maxItems": 1}, ["[]", "[1]"], ["[1,1]"]),
        ({"type": "array", "uniqueItems": True, "items": {"enum": ["a", "b"]}, "minItems": 1},
         ['["a"]', '["b","a"]'], ["[]", '["a","a"]', '["c"]']),
        ({"type": "array", "uniqueItems": True, "items": {"$ref": "#/$defs/c"}, "$defs": {"c": {"enum": [1, 2, 1.0]}}},
         ["[2,1]", "[]"], ["[1,1]"]),
        ({"type": "array", "contains": {"const": 1}, "maxItems": 3}, ["[1]", "[0,0,1]"],
         ["[]", "[0,0,0]", "[1,1,1,1]"]),
        ({"type": "array", "contains": True, "minContains": 2}, ["[1,2]"], ["[1]"]),
        ({"type": "array", "items": [{"type": "null"}], "additionalItems": {"const": 1}}, ["[null,1,1]"], ["[1]"]),
        ({"type": "array", "prefixItems": [{"type": "null"}], "unevaluatedItems": False}, ["[null]"], ["[null,1]"]),
        ({"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": {"const": 1}},
         ["{}", '{"a":1,"b":1}'], ['{"c":1}', '{"a":2}']),
        ({"type": "object", "propertyNames": {"pattern": "^a"}}, ['{"ab":1}'], ['{"b":1}']),
        ({"type": "object", "propertyNames": {"maxLength": 1}}, ['{"a":1}'], ['{"ab":1}']),
        ({"type": "object", "propertyNames": {"format": "uuid"}}, ["{}"], ['{"b":1}']),
        ({"type": "object", "patternProperties": {"^x": {"const": 1}, "y$": {"const": 1}},
          "additionalProperties": False}, ['{"xa":1,"by":1}'], ['{"xa":2}', '{"a":1}']),
        ({"type": "object", "patternProperties": {"^[a-z]": {"const": 1}, "^[0-9]+$": True}, "properties": {"a": True}},
         ['{"b":1}', '{"7":2}', '{"a":1}'], ['{"b":2}', '{"a":2}']),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, ['{"a":1,"b":1}', '{"b":1}'], ['{"a":1}']),
        ({"type": "object", "dependencies": {"a": {"required": ["b"]}}}, ['{"a":1,"b":1}', "{}"], ['{"a":1}']),
        ({**TAG, **IF_X}, ['{"k":"y"}', '{"k":"x","v":1}', "{}"], ['{"k":"x"}']),
        ({**TAG, "allOf": [IF_X]}, ['{"k":"y"}', '{"k":"x","v":1}', "{}"], ['{"k":"x"}']),
        ({**TAG, "required": ["k"], **IF_X, "else": {"properties": {"v": False}}},
         ['{"k":"y"}', '{"k":"x","v":1}'], ['{"k":"y","v":1}', '{"k":"x"}']),
        ({**TAG, "additionalProperties": True, **IF_X, "else": {"if": {"properties": {"k": {"const": "y"}}},
          "then": {"required": ["w"]}}}, ['{"k":"x","v":1}', '{"k":"y","w":1}'], ['{"k":"y"}', "{}"]),
        ({"if": True, "then": {"type": "null"}}, ["null"], ["1"]),
        ({"not": {"type": ["string", "object"]}}, ["1", "[]"], ['"a"', "{}"]),
        ({"enum": ["a", "b"], "not": {"const": "a"}}, ['"b"'], ['"a"']),
        ({"type": "object", "not": {"required": ["a"]}}, ['{"b":1}'], ['{"a":1}']),
        ({"oneOf": [{"type": "object", "properties": {"t": {"const": t}}, "required": ["t"]} for t in "ab"]},
         ['{"t":"a"}', '{"t":"b"}'], ['{"t":"c"}']),
        ({"discriminator": {"propertyName": "t"},  # pydantic does not require properties with defaults
          "oneOf": [{"type": "object", "properties": {"t": {"const": t, "default": t}}} for t in "ab"]},
         ['{"t":"a"}', '{"t":"b","x":1}'], ["{}", '{"t":"c"}']),
        ({"oneOf": [{"required": ["a"]}, {"required": ["b"]}], "type": "object"}, ['{"a":1}', '{"b":1}'],
         ["{}", '{"a":1,"b":1}']),
        ({"oneOf": [{"required": ["a"]}, {"required": ["b"]}]}, ['{"a":1}'], ["5", "null"]),
        ({"oneOf": [{"type": "integer", "maximum": 3}, {"type": "integer", "minimum": 4}]}, ["3", "4"], ['"a"']),
        ({"type": "object", "properties": {"a": {}, "b": {}}, "additionalProperties": False, "minProperties": 1},
         ['{"a":1}', '{"b":1}'], ["{}"]),
        ({"type": "object", "properties": {"a": {}, "b": {}}, "additionalProperties": False, "maxProperties": 1},
         ['{"a":1}', "{}"], ['{"a":1,"b":1}']),
        ({"type": "object", "minProperties": 1}, ['{"a":1}'], ["{}"]),
        ({"allOf": [{"properties": {"a": {"type": "null"}}}], "type": "object", "unevaluatedProperties": False},
         ['{"a":null}'], ['{"b":1}', '{"a":1}']),
        ({"allOf": [{"type": "integer", "multipleOf": 4}, {"multipleOf": 6}]}, ["12", "0"], ["4", "6"]),
        ({"type": "string", "nullable": True}, ["null", '"a"'], ["1"]),
        ({"type": "string", "minLength": 1.0, "format": "password", "writeOnly": True, "x-order": 3}, ['"a"'], ['""']),
        ({"type": "string", "format": "date"}, ['"2024-02-29"', '"2000-02-29"'], ['"2023-02-29"', '"1900-02-29"']),
        ({"type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"}, ['"1.5"', '"-.5"'], ['"."', '"-"', '""']),
        ({"type": "string", "pattern":
          r"^(?!^[-+.]*$)[+-]?0*(?:\d{0,8}|(?=[\d.]{1,11}0*$)\d{0,8}\.\d{0,2}0*$)"}, ['"1.20"'], ['"1.234"', '"."']),
        ({"type": "string", "pattern": "^[[&&a]$"}, ['"["', '"&"'], ['"b"']),
        ({"type": "string", "pattern": "^.$"}, ['"a"'], ['"\u2028"']),
        # An optional property may be left out if no value satisfies its schema.
        ({"type": "object", "properties": {"a": {"$ref": "#/$defs/no"}, "b": {"$ref": "#/$defs/endless"}}, "$defs": {
            "no": {"type": "integer", "minimum": 2, "maximum": 1},
            "endless": {"type": "object", "properties": {"c": {"$ref": "#/$defs/endless"}}, "required": ["c"]}}},
         ["{}", '{"c":1}'], ['{"a":1}', '{"b":{}}']),
        ({"anyOf": [{"$ref": "#/$defs/no"}, {"type": "null"}], "$defs": {"no": False}}, ["null"], ["1"]),
        # Properties come in the order of the schema, and then the names that only `required` has.
        ({"type": "object", "properties": {"b": {}, "a": {}}, "required": ["c", "a"]}, ['{"b":1,"a":1,"c":1}'],
         ['{"a":1,"b":1,"c":1}', '{"b":1,"a":1}']),
        ({"type": "object", "properties": {"a": {"type": "null"}}}, ['{"a":null,"b":1}'], ['{"\\u0061":1}']),
    ],
)  # fmt: skip
def test_supported_keywords_are_obeyed_exactly(schema: Any, right: list[str], wrong: list[str]) -> None:
    check(schema, right, wrong)


@pytest.mark.parametrize(
    ("schema", "dropped"),
    [
        ({"type": "array", "items": {"type": "string"}, "uniqueItems": True}, "uniqueItems at #"),
        ({"properties": {"a/b": {"type": "array", "uniqueItems": True}}}, "uniqueItems at #/properties/a~1b"),
        ({"type": "array", "contains": {"const": 1}}, "contains at #"),
        ({"type": "object", "properties": {"a": {}}, **IF_X}, "if at #"),
        ({"type": "string", "not": {"pattern": "a"}}, "not at #"),
        ({"type": "string", "format": "iri"}, "format iri at #"),
        ({"type": "string", "pattern": "^(?=.*a)b"}, "pattern at #"),
        ({"type": "string", "pattern": r"\bword"}, "pattern at #"),
        ({"type": "object", "minProperties": 2}, "minProperties at #"),
        ({"type": "integer", "multipleOf": 1000003}, "multipleOf at #"),
        ({"allOf": [{"type": "integer", "multipleOf": 9973}, {"minimum": 5}]}, "multipleOf at #/allOf/0"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf at #"),
        ({"type": "object", "propertyNames": {"not": {"const": "a"}}}, "propertyNames at #"),
        ({"type": "object", "patternProperties": {"^x": {"const": 1}, "y$": True}}, "patternProperties at #"),
        ({"anyOf": [{"properties": {"a": {}}}], "unevaluatedProperties": False}, "unevaluatedProperties at #"),
    ],
)
def test_unsupported_keywords_are_dropped_and_named_or_refused_if_strict(schema: Any, dropped: str) -> None:
    assert prepare(schema, strict=False).dropped == (dropped,)
    of_schema(schema)
    keyword, _, place = dropped.rpartition(" at ")
    with pytest.raises(RequestError, match=r"^structured_outputs\.json can't be obeyed") as caught:
        prepare(schema, strict=True)
    assert f"{keyword} at {place} is not supported" in str(caught.value)


def test_many_conditions_on_one_property_become_one_list_of_alternatives() -> None:
    """If each condition had its own alternatives, the library would try 3^30 combinations."""
    kinds = [f"k{i}" for i in range(30)]
    schema = {
        "type": "object",
        "properties": {"k": {"enum": kinds}},
        "required": ["k"],
        "allOf": [
            {"if": {"properties": {"k": {"const": kind}}}, "then": {"required": [f"of_{kind}"]}} for kind in kinds
        ],
    }
    check(schema, ['{"k":"k7","of_k7":1}'], ['{"k":"k7"}', '{"k":"k7","of_k8":1}'])


def test_invalid_schemas_are_refused_with_the_place_and_the_value() -> None:
    for schema, message in (
        ({"anyOf": []}, "anyOf at # must be a list of at least one schema, got []"),
        ({"properties": {"a": {"type": "text"}}}, "type at #/properties/a must be one of"),
        ({"type": "object", "required": "a"}, "required at # must be a list of texts, got 'a'"),
        ({"type": "string", "maxLength": -1}, "maxLength at # must be a whole number that is not negative, got -1"),
        ({"items": {"properties": [1]}}, "properties at #/items must be an object, got [1]"),
        ({"type": "string", "pattern": "(a"}, "pattern at # is not a regular expression: unclosed group"),
    ):
        with pytest.raises(RequestError) as caught:
            prepare(schema, strict=False)
        assert str(caught.value).startswith(f"structured_outputs.json: {message}")


def test_a_summary_of_dropped_keywords_is_one_line_of_ascii_with_a_maximum_length() -> None:
    assert summarize_keywords(("if at #", "not at #/properties/é,\n"), 100) == "if at #, not at #/properties/\\xe9%2C?"
    text = summarize_keywords(tuple(f"uniqueItems at #/properties/{i}" for i in range(1000)), 1000)
    assert len(text) <= 1000
    assert text.endswith(f", and {1000 - text.count('uniqueItems')} more")


# --- size ----------------------------------------------------------------------------------------------------------


def chain(length: int, link: str) -> dict[str, Any]:
    """Return a schema with a chain of definitions: each is `link`, with a reference to the next one for NEXT."""
    made: dict[str, Any] = {str(length): {"type": "null"}}
    for i in range(length):
        made[str(i)] = json.loads(link.replace("NEXT", f"#/$defs/{i + 1}"))
    return {"$ref": "#/$defs/0", "$defs": made}


@pytest.mark.slow
@pytest.mark.parametrize(
    "link", ['{"$ref": "NEXT"}', '{"type": "array", "items": {"$ref": "NEXT"}}', '{"anyOf": [{"$ref": "NEXT"}]}']
)
def test_thousands_of_references_in_a_chain_are_followed(link: str) -> None:
    of_schema(chain(5000, link))


def test_too_deeply_nested_schemas_are_refused_with_depth_and_limit() -> None:
    schema: dict[str, Any] = {}
    for _ in range(10_000):
        schema = {"type": "array", "items": schema}
    ring = {str(i): {"properties": {"a": {"$ref": f"#/$defs/{(i + 1) % 900}"}}} for i in range(900)}
    for given, message in (
        (schema, r"nested too deeply \(10000 levels, 300 are allowed\)"),
        ('{"items":' * 20_000 + "{}" + "}" * 20_000, r"nested too deeply \(20001 levels, 300 are allowed\)"),
        ({"const": json.loads("[" * 100 + "]" * 100)}, r"nested too deeply \(\d+ levels, 80 are allowed\)"),
        ({"$ref": "#/$defs/0", "$defs": ring}, r"nested too deeply \(\d+ levels including its references, 500 are"),
    ):
        with pytest.raises(RequestError, match=message):
            prepare(given, strict=False)


@pytest.mark.slow
def test_prepared_schemas_do_not_crash_the_library() -> None:
    """Unprepared, each of these schemas crashes the process, or takes minutes and gigabytes of memory."""
    script = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
from shoal.errors import RequestError
from support.grammars import of_schema
for schema in json.load(sys.stdin):
    try:
        of_schema(schema)
    except RequestError:
        pass
print("alive")
"""
    edge = -(2**63)
    deadly: list[Any] = [
        *({"const": value} for value in (edge, edge - 1, -(10**19))),
        *({"type": "integer", name: edge} for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")),
        {"type": "integer", "minimum": edge - 5, "maximum": edge},
        {"type": "number", "minimum": -1e300},
        {"type": "integer", "multipleOf": 9999991},
        *(chain(5000, link) for link in ('{"$ref": "NEXT"}', '{"type": "array", "items": {"$ref": "NEXT"}}')),
        chain(3000, '{"anyOf": [{"type": "string"}, {"type": "object", "properties": {"a": {"$ref": "NEXT"}}}]}'),
        chain(3000, '{"type": "object", "properties": {"v": {"maximum": 1e19}, "a": {"$ref": "NEXT"}}}'),
    ]
    done = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(deadly), env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr
