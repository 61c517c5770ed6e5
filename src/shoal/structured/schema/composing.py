"""A prepared schema as llguidance's grammar: as a schema, or where it has numbers of many digits, as rules around some.

Rules of llguidance's Lark may have JSON schemas inside of them, and not the other way round. So what leads to such a
number is written as rules, and what does not as schemas.
"""

import json
from collections.abc import Mapping
from typing import Any

from shoal.errors import RequestError
from shoal.structured.schema.node import TYPES, Schema
from shoal.structured.schema.numbers import PLACE, TERMINAL

_PREFIX = "#/$defs/"
_OBJECT = ("properties", "patternProperties", "additionalProperties", "required", "minProperties", "maxProperties")
_ARRAY = ("prefixItems", "items", "minItems", "maxItems")
_APPLY = ("$ref", "allOf", "anyOf", "enum")
_MOST_RULES = 2000  # at 5,000 in a chain the library runs out of stack
_NEVER = r"/[^\s\S]/"
# A text of JSON that spells each character one way, as the library's own do.
_NAME = r'/"([^"\\\x00-\x1F\x7F]|\\["\\bfnrt]|\\u00(0[0-7bB]|0[eEfF]|1[0-9a-fA-F]|7[fF]))*"/'


def grammar_of(schema: Mapping[str, Any], whitespace: str) -> str:
    """
    Args:
        schema: as `prepare` gives it.
        whitespace: a regular expression of what may be between two symbols.

    Raises:
        RequestError: it has a number of many digits where no rule can be written, or a text without a UTF-8 form.
    """
    schema = dict(schema)
    definitions = schema.pop("$defs", {})
    leading = _leading(definitions)
    if not _leads(schema, leading):
        whole = {"x-guidance": {"whitespace_pattern": whitespace}, **schema}
        grammar: dict[str, Any] = {"json_schema": {**whole, "$defs": definitions} if definitions else whole}
    else:
        grammar = {"lark_grammar": _Rules(definitions, leading, whitespace).text(schema)}
    text = json.dumps({"grammars": [grammar]}, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair
        raise RequestError(f"structured_outputs.json has no UTF-8 form: {error.reason}") from error
    return text


def _leading(definitions: Mapping[str, Schema]) -> set[str]:
    """The definitions that have a number of many digits in them, or refer to one that does."""
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


def _leads(schema: Any, leading: set[str]) -> bool:
    terminals, references = _contents(schema)
    return terminals or not leading.isdisjoint(references)


def _contents(schema: Any) -> tuple[bool, set[str]]:
    """Whether there is a terminal inside, and what is referred to."""
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
    """Rules of Lark, made as they are asked for. An expression that is None matches nothing."""

    def __init__(self, definitions: Mapping[str, Schema], leading: set[str], whitespace: str) -> None:
        self._definitions = definitions
        self._leading = leading
        self._whitespace = whitespace
        self._lines: list[str] = []
        self._named: dict[str, str] = {}  # a body -> its name
        self._pending: list[str] = []
        self._met: set[str] = set()

    def text(self, root: Schema) -> str:
        start = self._schema(root)
        if start is None:
            raise RequestError("structured_outputs.json can't be obeyed: no text satisfies the schema")
        while self._pending:
            name = self._pending.pop()
            self._lines.append(f"d{name}: {self._schema(self._definitions[name]) or _NEVER}")
        head = ['%llguidance {"ignore_once": true}', f"%ignore /{self._whitespace}/", f"start: {start}"]
        return "\n".join([*head, *self._lines]) + "\n"

    def _rule(self, body: str, kind: str = "r") -> str:
        if body not in self._named:
            if len(self._named) >= _MOST_RULES:
                raise RequestError(
                    f"structured_outputs.json can't be obeyed: a schema with numbers of many digits may have "
                    f"{_MOST_RULES} parts around them; use smaller bounds"
                )
            self._named[body] = f"{kind}{len(self._named)}"
            self._lines.append(f"{self._named[body]}: {body}")
        return self._named[body]

    def _schema(self, schema: Schema) -> str | None:
        if schema is False:
            return None
        if schema is True or not _leads(schema, self._leading):
            return self._json(schema)
        if TERMINAL in schema:
            return self._rule(schema[TERMINAL], "N")
        applied = [name for name in _APPLY if name in schema]
        if len(applied) > 1 or (applied and len(schema) > 1) or applied == ["allOf"]:
            raise _in_between(schema)
        if applied == ["$ref"]:
            return self._definition(schema["$ref"].removeprefix(_PREFIX))
        if applied:
            return self._any([self._schema(each) for each in schema["anyOf"]])
        return self._types(schema)

    def _definition(self, name: str) -> str:
        if name not in self._met:
            self._met.add(name)
            self._pending.append(name)
        return f"d{name}"

    def _types(self, schema: dict[str, Any]) -> str | None:
        """A schema of keywords of types, each type by itself."""
        given = schema.get("type", list(TYPES))
        types = [given] if isinstance(given, str) else given
        found: list[str | None] = []
        for kind, names, make in (("object", _OBJECT, self._object), ("array", _ARRAY, self._array)):
            keywords = {name: schema[name] for name in names if name in schema}
            if kind in types and _leads(keywords, self._leading):
                found.append(make(keywords))
                types = [name for name in types if name != kind]
        rest = {name: value for name, value in schema.items() if not _leads(value, self._leading)}
        return self._any([self._json({**rest, "type": types}) if types else None, *found])

    def _any(self, found: list[str | None]) -> str | None:
        left = [each for each in found if each is not None]
        return self._rule(" | ".join(left)) if len(left) > 1 else left[0] if left else None

    def _json(self, schema: Schema) -> str:
        """A schema inside of the rules, with the definitions that it needs."""
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
            raise _in_between(keywords)
        required = keywords.get("required", [])
        members: list[tuple[str, bool]] = []
        for name in dict.fromkeys([*named, *required]):
            value = self._schema(named.get(name, others))
            if value is None and name in required:
                return None
            if value is not None:
                members.append((f'{_literal(name)} ":" {value}', name in required))
        rest = self._schema(others)
        if rest is not None:
            taken = " | ".join(_literal(name) for name in dict.fromkeys([*named, *required]))
            name = self._rule(f"{_NAME} & ~({taken})" if taken else _NAME, "N")
            member = self._rule(f'{name} ":" {rest}')
            members.append((f'{member} ("," {member})*', False))
        return self._rule(f'"{{" {self._members(members)} "}}"')

    def _members(self, members: list[tuple[str, bool]]) -> str:
        """Members in their order, of which some have to be there, with commas between those that are."""
        after, alone = "", ""  # what may follow a member; what may be there if none came before
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
        rest = self._schema(keywords.get("items", True)) if most is None or most > len(first) else None
        items = [self._schema(each) for each in first]
        if None in items:  # there can be none there, so nothing behind it either
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
    """A member's name as a literal of Lark."""
    return json.dumps(json.dumps(name, ensure_ascii=False), ensure_ascii=False)


def _in_between(schema: Any) -> RequestError:
    pending, place = [schema], ""
    while pending and not place:
        each = pending.pop()
        if isinstance(each, dict):
            place = each.get(PLACE, "")
        pending.extend(each.values() if isinstance(each, dict) else each if isinstance(each, list) else ())
    return RequestError(
        f"structured_outputs.json can't be obeyed: a number of more than 15 digits{f' at {place}' if place else ''} "
        "where several schemas hold together, or names by a pattern: write it into one schema, or use fewer digits"
    )
