"""Rewriting the keywords of objects."""

from itertools import combinations
from math import comb
from typing import Any

from shoal.structured.schema.listed_values import listed_values
from shoal.structured.schema.node import (
    Location,
    Schema,
    SchemaRewriter,
    any_of,
    read_count,
    read_names,
    read_object,
    read_types,
)
from shoal.structured.schema.patterns import patterns_disjoint
from shoal.structured.schema.strings import read_format, read_pattern

_MAX_CHOICES = 64  # combinations of optional properties that a schema may be written out as
# Keywords that apply other schemas to the same object, so that `unevaluatedProperties` depends on them.
_APPLICATORS = (
    "$ref",
    "$dynamicRef",
    "$recursiveRef",
    "allOf",
    "anyOf",
    "oneOf",
    "if",
    "dependentSchemas",
    "dependencies",
)
_MAX_PATTERNS = 200
_ANY_NAME = ""  # a pattern


class _Members:
    """The members that a schema allows an object: those it names, those whose name matches a pattern, and all others.

    `others` is the schema of the last kind.
    """

    def __init__(self, rewriter: SchemaRewriter, keywords: dict[str, Any], here: Location) -> None:
        self.named: dict[str, Schema] = {}
        self.by_pattern: dict[str, Schema] = {}
        self.required = read_names(keywords.get("required", []), "required", here)
        self.others: Schema = True
        self._read(rewriter, keywords, here)

    @property
    def closed(self) -> bool:
        return self.others is False and not self.by_pattern

    @property
    def optional(self) -> list[str]:
        """The names of the members that an object may have but need not have."""
        return [name for name, schema in self.named.items() if name not in self.required and schema is not False]

    def _read(self, rewriter: SchemaRewriter, keywords: dict[str, Any], here: Location) -> None:
        for name, node in read_object(keywords, "properties", here).items():
            self.named[name] = rewriter.rewrite_child(node, here, "properties", name)
        if "additionalProperties" in keywords:
            self.others = rewriter.rewrite_child(keywords["additionalProperties"], here, "additionalProperties")
        else:
            self._unevaluated(rewriter, keywords, here)
        self._patterns(rewriter, keywords, here)
        if "propertyNames" in keywords and not self._names(rewriter, keywords["propertyNames"], here):
            rewriter.drop_keyword("propertyNames", here)

    def _unevaluated(self, rewriter: SchemaRewriter, keywords: dict[str, Any], here: Location) -> None:
        rest = keywords.get("unevaluatedProperties", True)
        if rest is True or rest == {}:
            return
        applied = [name for name in _APPLICATORS if name in keywords]
        names = set() if not applied else _evaluated(rewriter, keywords, here) if rest is False else None
        if names is None:
            rewriter.drop_keyword("unevaluatedProperties", here, "beside keywords that apply other schemas")
            return
        self.named |= {name: True for name in sorted(names) if name not in self.named}
        self.others = rewriter.rewrite_child(rest, here, "unevaluatedProperties")

    def _patterns(self, rewriter: SchemaRewriter, keywords: dict[str, Any], here: Location) -> None:
        alike: dict[str, list[str]] = {}
        schemas: dict[str, Schema] = {}
        for pattern, node in read_object(keywords, "patternProperties", here).items():
            regex = read_pattern(rewriter, pattern, f"patternProperties {pattern[:40]}", here)
            if regex is None:
                self.others = True  # a name that the dropped pattern matches must not be checked as one of the others
                continue
            schema = rewriter.rewrite_child(node, here, "patternProperties", pattern)
            alike.setdefault(repr(schema), []).append(regex)
            schemas[repr(schema)] = schema
        merged = {"|".join(regexes): schemas[key] for key, regexes in alike.items()}
        if len(merged) > _MAX_PATTERNS or any(not patterns_disjoint(*pair) for pair in combinations(merged, 2)):
            rewriter.drop_keyword("patternProperties", here, "where a name may match two of the patterns")
            self.others = True
        else:
            self.by_pattern = merged

    def _names(self, rewriter: SchemaRewriter, node: Any, here: Location) -> bool:
        """Apply the schema `node` of `propertyNames`; return False if that is not possible."""
        node, at = rewriter.follow(node, here.under("propertyNames"))
        keywords = rewriter.keywords(node) if isinstance(node, dict) else {}
        types = read_types(keywords, at)
        values = listed_values(rewriter, node, at)
        if types is not None and "string" not in types:
            values = []
        if values is None and keywords.keys() <= {"type"}:  # any name
            return True
        if self.by_pattern and values != []:
            return False
        if values is not None:
            self._only([value for value in values if isinstance(value, str)])
            return True
        regex = None if self.named else _name_pattern(rewriter, keywords, at)
        if regex:
            self.by_pattern, self.others = {regex: self.others}, False
        return regex is not None

    def _only(self, names: list[str]) -> None:
        self.named = {name: schema if name in names else False for name, schema in self.named.items()}
        self.named |= {name: self.others for name in names if name not in self.named}
        self.others = False
        self.by_pattern = {}


def object_keywords(
    rewriter: SchemaRewriter, keywords: dict[str, Any], types: list[str] | None, here: Location
) -> tuple[Schema, list[Schema]]:
    """Return the rewritten keywords of objects, and schemas that must be satisfied in addition.

    The first is False if no object satisfies the keywords.
    """
    members = _Members(rewriter, keywords, here)
    least, most = read_count(keywords, "minProperties", here, 0) or 0, read_count(keywords, "maxProperties", here)
    if most is not None and max(least, len(members.required)) > most:
        return False, []
    counts: dict[str, Any] = {}
    extra: list[Schema] = []
    kind = {"type": types} if types else {}
    if least > len(members.required):
        extra += _at_least(rewriter, members, least, kind, counts, here)
    if most is not None:
        extra += _at_most(rewriter, members, most, kind, counts, here)
    if any(part is False for part in extra):
        return False, []
    if members.named and members.others is not False and not members.by_pattern and not here.joined and not counts:
        # The library recognizes a named member among the others only in its plain spelling: it takes "\u0061" for
        # another name than "a". If the others are given by a pattern, it allows only one spelling of each name.
        members.by_pattern, members.others = {_ANY_NAME: members.others}, False
    found: dict[str, Any] = {}
    if members.named:
        found["properties"] = members.named
    if members.by_pattern:
        found["patternProperties"] = members.by_pattern
    if members.others is not True:
        found["additionalProperties"] = members.others
    if members.required:
        found["required"] = members.required
    return ({**found, **counts} or True), extra


def _at_least(
    rewriter: SchemaRewriter,
    members: _Members,
    least: int,
    kind: dict[str, Any],
    counts: dict[str, Any],
    here: Location,
) -> list[Schema]:
    """Rewrite `minProperties`, for more members than are required, and return schemas that must be satisfied.

    Puts it into `counts` instead if the library can obey it.
    """
    more = least - len(members.required)
    optional = members.optional
    if members.closed:
        if more > len(optional):
            return [False]
        if comb(len(optional), more) <= _MAX_CHOICES:
            return [any_of([{**kind, "required": list(names)} for names in combinations(optional, more)])]
    elif more == 1 and not optional and not here.joined:
        counts["minProperties"] = least
        return []
    # A model may write the same name twice for members that the schema does not name; they would be counted as two.
    rewriter.drop_keyword("minProperties", here)
    return []


def _at_most(
    rewriter: SchemaRewriter, members: _Members, most: int, kind: dict[str, Any], counts: dict[str, Any], here: Location
) -> list[Schema]:
    """Rewrite `maxProperties` and return schemas that must be satisfied.

    Puts it into `counts` instead if the library can obey it.
    """
    optional = members.optional
    fewer = len(optional) - (most - len(members.required))  # optional members that must be absent
    if members.closed:
        if fewer <= 0:
            return []
        if comb(len(optional), fewer) <= _MAX_CHOICES:
            choices = combinations(optional, fewer)
            return [any_of([{**kind, "properties": dict.fromkeys(names, False)} for names in choices])]
    elif not optional and not here.joined:
        counts["maxProperties"] = most
        return []
    rewriter.drop_keyword("maxProperties", here)
    return []


def _name_pattern(rewriter: SchemaRewriter, keywords: dict[str, Any], here: Location) -> str | None:
    """Return a pattern for the names that satisfy a schema: empty if all do, None if no pattern can express it."""
    left = keywords.keys() - {"type"}
    if left == {"pattern"}:
        return read_pattern(rewriter, keywords["pattern"], "pattern", here)
    if left <= {"minLength", "maxLength"}:
        least, most = read_count(keywords, "minLength", here, 0), read_count(keywords, "maxLength", here)
        return f"^(?s:.{{{least},{'' if most is None else most}}})$"
    if left == {"format"} and isinstance(keywords["format"], str):
        found = read_format(keywords["format"])
        return None if found is None else found.get("pattern", "" if not found else None)
    return None


def _evaluated(rewriter: SchemaRewriter, keywords: dict[str, Any], here: Location, depth: int = 8) -> set[str] | None:
    """Return the members that a schema, and the schemas it applies to the same object, name in `properties`.

    None if that depends on the object, or if members are described in another way than by their names.
    """
    if depth == 0 or any(name in keywords for name in ("anyOf", "oneOf", "if", "dependentSchemas", "dependencies")):
        return None
    if keywords.keys() & {"$dynamicRef", "$recursiveRef"}:
        return None
    names = set(read_object(keywords, "properties", here))
    inner = [(node, here) for node in keywords.get("allOf", [])]
    if "$ref" in keywords:
        target = rewriter.resolve_reference("$ref", keywords["$ref"], here)
        inner.append((target.node, here.at(target)))
    for node, at in [rewriter.follow(*each) for each in inner]:
        if not isinstance(node, dict):
            continue
        found = rewriter.keywords(node)
        if found.keys() & {"patternProperties", "additionalProperties", "unevaluatedProperties"}:
            return None
        below = _evaluated(rewriter, found, at, depth - 1)
        if below is None:
            return None
        names |= below
    return names
