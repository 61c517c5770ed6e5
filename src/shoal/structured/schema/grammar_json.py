"""Writing a prepared schema as a grammar of llguidance, in JSON.

A long number, one of more than 15 digits, is matched by a terminal, which no JSON schema of llguidance can contain. A
rule of its Lark grammars can contain both terminals and JSON schemas. So every part of a schema that contains a long
number is written as rules, and all other parts are left as schemas inside these.
"""

import json
from collections.abc import Mapping
from typing import Any

from shoal.errors import RequestError
from shoal.structured.schema.node import TYPES, Schema
from shoal.structured.schema.numbers import PLACE, TERMINAL
from shoal.structured.schema.schema_error import schema_error

_PREFIX = "#/$defs/"
_OBJECT = ("properties", "patternProperties", "additionalProperties", "required", "minProperties", "maxProperties")
_ARRAY = ("prefixItems", "items", "minItems", "maxItems")
_NOT_OF_TYPES = ("$ref", "allOf", "anyOf", "enum")
_MAX_RULES = 2000  # a chain of 5,000 rules overflows the library's stack
_NEVER = r"/[^\s\S]/"  # matches nothing
# A JSON string in which each character has one spelling, as in the strings that the library itself allows.
_NAME = r'/"([^"\\\x00-\x1F\x7F]|\\["\\bfnrt]|\\u00(0[0-7bB]|0[eEfF]|1[0-9a-fA-F]|7[fF]))*"/'


def grammar_json(schema: Mapping[str, Any], whitespace: str) -> str:
    """Return the grammar of all JSON texts that satisfy a schema, in llguidance's form.

    Args:
        schema: the schema as `prepare` returns it.
        whitespace: a regular expression for the whitespace that is allowed between two symbols.

    Raises:
        RequestError: the schema has a long number where no rule can be written, or a text that has no UTF-8 form.
    """
    schema = dict(schema)
    definitions = schema.pop("$defs", {})
    long_definitions = _find_long_definitions(definitions)
    if not _has_long_number(schema, long_definitions):
        whole = {"x-guidance": {"whitespace_pattern": whitespace}, **schema}
        grammar: dict[str, Any] = {"json_schema": {**whole, "$defs": definitions} if definitions else whole}
    else:
        grammar = {"lark_grammar": _Rules(definitions, long_definitions, whitespace).text(schema)}
    text = json.dumps({"grammars": [grammar]}, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair
        raise schema_error(f"has no UTF-8 form: {error.reason}") from error
    return text


def _find_long_definitions(definitions: Mapping[str, Schema]) -> set[str]:
    """Return the names of the definitions that contain a long number or refer, directly or not, to one that does."""
    users: dict[str, list[str]] = {}
    found: list[str] = []
    for name, schema in definitions.items():
        terminals, references = _contents(schema)
        found += [name] if terminals else []
        for other in references:
            users.setdefault(other, []).append(name)
    known = set(found)
    while found:
        fresh = [name for name in users.get(found.pop(), ()) if name not in known]
        known.update(fresh)
        found += fresh
    return known


def _has_long_number(schema: Any, long_definitions: set[str]) -> bool:
    terminals, references = _contents(schema)
    return terminals or not long_definitions.isdisjoint(references)


def _contents(schema: Any) -> tuple[bool, set[str]]:
    """Return whether a schema contains a terminal, and the names of the definitions that it refers to."""
    pending, references, terminals = [schema], set(), False
    while pending:
        each = pending.pop()
        if isinstance(each, list):
            pending.extend(each)
        elif isinstance(each, dict):
            terminals = terminals or TERMINAL in each
            reference = each.get("$ref")
            if isinstance(reference, str):
                references.add(reference.removeprefix(_PREFIX))
            pending.extend(value for name, value in each.items() if name != "enum")
    return terminals, references


class _Rules:
    """The rules of a Lark grammar for one schema, written as they are needed.

    Methods that return `str | None` return an expression to be used in a rule, or None if no text can match.
    """

    def __init__(self, definitions: Mapping[str, Schema], long_definitions: set[str], whitespace: str) -> None:
        self._definitions = definitions
        self._long_definitions = long_definitions
        self._whitespace = whitespace
        self._lines: list[str] = []
        self._named: dict[str, str] = {}  # body of a rule -> name of the rule
        self._pending: list[str] = []  # definitions whose rules must be written
        self._queued: set[str] = set()  # definitions that are or were pending

    def text(self, root: Schema) -> str:
        """Return the whole grammar."""
        start = self._expression(root)
        if start is None:
            raise schema_error("can't be obeyed: no text satisfies the schema")
        while self._pending:
            name = self._pending.pop()
            self._lines.append(f"d{name}: {self._expression(self._definitions[name]) or _NEVER}")
        head = ['%llguidance {"ignore_once": true}', f"%ignore /{self._whitespace}/", f"start: {start}"]
        return "\n".join([*head, *self._lines]) + "\n"

    def _rule(self, body: str, kind: str = "r") -> str:
        """Return the name of the rule with this body, which is written if there is none. Kind "N": a terminal."""
        if body not in self._named:
            if len(self._named) >= _MAX_RULES:
                raise schema_error(
                    f"can't be obeyed: at most {_MAX_RULES} parts of a schema may contain "
                    "numbers of more than 15 digits; use smaller bounds"
                )
            self._named[body] = f"{kind}{len(self._named)}"
            self._lines.append(f"{self._named[body]}: {body}")
        return self._named[body]

    def _expression(self, schema: Schema) -> str | None:
        if schema is False:
            return None
        if schema is True or not _has_long_number(schema, self._long_definitions):
            return self._json_rule(schema)
        if TERMINAL in schema:
            return self._rule(schema[TERMINAL], "N")
        applied = [name for name in _NOT_OF_TYPES if name in schema]
        if len(applied) > 1 or (applied and len(schema) > 1) or applied == ["allOf"]:
            raise _long_number_error(schema)
        if applied == ["$ref"]:
            return self._definition(schema["$ref"].removeprefix(_PREFIX))
        if applied:
            return self._any_of([self._expression(each) for each in schema["anyOf"]])
        return self._one_rule_per_type(schema)

    def _definition(self, name: str) -> str:
        if name not in self._queued:
            self._queued.add(name)
            self._pending.append(name)
        return f"d{name}"

    def _one_rule_per_type(self, schema: dict[str, Any]) -> str | None:
        """Return an expression for a schema with keywords of single types: a rule for each type with a long number."""
        given = schema.get("type", list(TYPES))
        types = [given] if isinstance(given, str) else given
        found: list[str | None] = []
        for kind, names, make in (("object", _OBJECT, self._object), ("array", _ARRAY, self._array)):
            keywords = {name: schema[name] for name in names if name in schema}
            if kind in types and _has_long_number(keywords, self._long_definitions):
                found.append(make(keywords))
                types = [name for name in types if name != kind]
        rest = {name: value for name, value in schema.items() if not _has_long_number(value, self._long_definitions)}
        return self._any_of([self._json_rule({**rest, "type": types}) if types else None, *found])

    def _any_of(self, found: list[str | None]) -> str | None:
        left = [each for each in found if each is not None]
        return self._rule(" | ".join(left)) if len(left) > 1 else left[0] if left else None

    def _json_rule(self, schema: Schema) -> str:
        """Return a rule that contains a JSON schema together with the definitions that it needs."""
        whole: dict[str, Any] = {"x-guidance": {"whitespace_pattern": self._whitespace}}
        whole |= schema if isinstance(schema, dict) else {}
        needed: dict[str, Schema] = {}
        pending = list(_contents(schema)[1])
        while pending:
            name = pending.pop()
            if name not in needed:
                needed[name] = self._definitions[name]
                pending.extend(_contents(needed[name])[1])
        if needed:
            whole["$defs"] = {name: needed[name] for name in sorted(needed, key=int)}
        return self._rule(f"%json {json.dumps(whole, ensure_ascii=False)}")

    def _object(self, keywords: dict[str, Any]) -> str | None:
        named: dict[str, Schema] = keywords.get("properties", {})
        others: Schema = keywords.get("additionalProperties", True)
        patterns = keywords.get("patternProperties", {})
        if patterns.keys() == {""} and others is False:  # any name
            others, patterns = patterns[""], {}
        if patterns or keywords.keys() & {"minProperties", "maxProperties"}:
            raise _long_number_error(keywords)
        required = keywords.get("required", [])
        members: list[tuple[str, bool]] = []
        for name in dict.fromkeys([*named, *required]):
            value = self._expression(named.get(name, others))
            if value is None and name in required:
                return None
            if value is not None:
                members.append((f'{_literal(name)} ":" {value}', name in required))
        rest = self._expression(others)
        if rest is not None:
            taken = " | ".join(_literal(name) for name in dict.fromkeys([*named, *required]))
            name = self._rule(f"{_NAME} & ~({taken})" if taken else _NAME, "N")
            member = self._rule(f'{name} ":" {rest}')
            members.append((f'{member} ("," {member})*', False))
        return self._rule(f'"{{" {self._members(members)} "}}"')

    def _members(self, members: list[tuple[str, bool]]) -> str:
        """Return an expression for members in this order, separated by commas.

        `members` has an expression for each, and whether the member is required.
        """
        after, alone = "", ""  # what may follow if a member was written before, and if none was
        for member, required in reversed(members):
            item = self._rule(member)
            if required:
                alone = self._rule(f"{item} {after}")
                after = self._rule(f'"," {item} {after}')
            else:
                alone = self._rule(f"({item} {after})?" if not alone else f"{item} {after} | {alone}")
                after = self._rule(f'("," {item})? {after}')
        return alone

    def _array(self, keywords: dict[str, Any]) -> str | None:
        least, most = keywords.get("minItems", 0), keywords.get("maxItems")
        first: list[Schema] = keywords.get("prefixItems", [])[:most]
        rest = self._expression(keywords.get("items", True)) if most is None or most > len(first) else None
        items = [self._expression(each) for each in first]
        if None in items:  # no item can stand at this position, so the array ends before it
            items, rest = items[: items.index(None)], None
        if least > len(items) and rest is None:
            return None
        tail = ""
        if rest is not None:
            fewest, largest = max(0, least - max(len(items), 1)), "" if most is None else most - max(len(items), 1)
            more = self._rule(f'"," {rest}')
            tail = f"{more}{{{fewest},{largest}}}"
            if not items:
                tail = self._rule(f"{rest} {tail}" if least else f"({rest} {tail})?")
        for place in reversed(range(len(items))):
            item = f"{'' if place == 0 else chr(34) + ',' + chr(34)} {items[place]} {tail}"
            tail = self._rule(item if place < least else f"({item})?")
        return self._rule(f'"[" {tail} "]"')


def _literal(name: str) -> str:
    """Return a literal of Lark for the name of a member."""
    return json.dumps(json.dumps(name, ensure_ascii=False), ensure_ascii=False)


def _long_number_error(schema: Any) -> RequestError:
    """Return the error for a schema with a long number for which no rule can be written."""
    pending, place = [schema], ""
    while pending and not place:
        each = pending.pop()
        if isinstance(each, dict):
            place = each.get(PLACE, "")
        pending.extend(each.values() if isinstance(each, dict) else each if isinstance(each, list) else ())
    return schema_error(
        f"can't be obeyed: a number of more than 15 digits{f' at {place}' if place else ''} "
        "can't be combined with allOf, anyOf beside other keywords, patternProperties, minProperties or maxProperties; "
        "write one schema, or use fewer digits"
    )
