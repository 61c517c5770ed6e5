"""Keywords of objects."""

from itertools import combinations
from math import comb
from typing import Any

from shoal.structured.schema.finite import finite_values
from shoal.structured.schema.node import Here, Rewrites, Schema, any_of, integer_of, mapping_of, names_of, types_of
from shoal.structured.schema.patterns import disjoint
from shoal.structured.schema.strings import format_keywords, pattern_of

_MOST_CHOICES = 64  # of properties that may be there or not
_APPLY = ("$ref", "$dynamicRef", "$recursiveRef", "allOf", "anyOf", "oneOf", "if", "dependentSchemas", "dependencies")
_MOST_PATTERNS = 200
_ANY_NAME = ""  # a pattern


class _Members:
    """An object's members while its keywords are read: named ones, those by a pattern, and all others."""

    def __init__(self, rewriter: Rewrites, words: dict[str, Any], here: Here) -> None:
        self.named: dict[str, Schema] = {}
        self.by_pattern: dict[str, Schema] = {}
        self.required = names_of(words.get("required", []), "required", here)
        self.others: Schema = True
        self._read(rewriter, words, here)

    @property
    def closed(self) -> bool:
        return self.others is False and not self.by_pattern

    @property
    def optional(self) -> list[str]:
        """Named ones that may be there or not."""
        return [name for name, schema in self.named.items() if name not in self.required and schema is not False]

    def _read(self, rewriter: Rewrites, words: dict[str, Any], here: Here) -> None:
        for name, node in mapping_of(words, "properties", here).items():
            self.named[name] = rewriter.child(node, here, "properties", name)
        if "additionalProperties" in words:
            self.others = rewriter.child(words["additionalProperties"], here, "additionalProperties")
        else:
            self._unevaluated(rewriter, words, here)
        self._patterns(rewriter, words, here)
        if "propertyNames" in words and not self._names(rewriter, words["propertyNames"], here):
            rewriter.skip("propertyNames", here)

    def _unevaluated(self, rewriter: Rewrites, words: dict[str, Any], here: Here) -> None:
        rest = words.get("unevaluatedProperties", True)
        if rest is True or rest == {}:
            return
        applied = [name for name in _APPLY if name in words]
        names = set() if not applied else _evaluated(rewriter, words, here) if rest is False else None
        if names is None:
            rewriter.skip("unevaluatedProperties", here, "beside what applies other schemas")
            return
        self.named |= {name: True for name in sorted(names) if name not in self.named}
        self.others = rewriter.child(rest, here, "unevaluatedProperties")

    def _patterns(self, rewriter: Rewrites, words: dict[str, Any], here: Here) -> None:
        alike: dict[str, list[str]] = {}
        schemas: dict[str, Schema] = {}
        for pattern, node in mapping_of(words, "patternProperties", here).items():
            regex = pattern_of(rewriter, pattern, f"patternProperties {pattern[:40]}", here)
            if regex is None:
                self.others = True  # whatever the pattern matches isn't among the others
                continue
            schema = rewriter.child(node, here, "patternProperties", pattern)
            alike.setdefault(repr(schema), []).append(regex)
            schemas[repr(schema)] = schema
        merged = {"|".join(regexes): schemas[key] for key, regexes in alike.items()}
        if len(merged) > _MOST_PATTERNS or any(not disjoint(*pair) for pair in combinations(merged, 2)):
            rewriter.skip("patternProperties", here, "where a name may match two of the patterns")
            self.others = True
        else:
            self.by_pattern = merged

    def _names(self, rewriter: Rewrites, node: Any, here: Here) -> bool:
        """Obey `propertyNames`, where that is possible."""
        node, at = rewriter.followed(node, here.under("propertyNames"))
        words = rewriter.words(node) if isinstance(node, dict) else {}
        types = types_of(words, at)
        values = finite_values(rewriter, node, at)
        if types is not None and "string" not in types:
            values = []
        if values is None and words.keys() <= {"type"}:  # any name
            return True
        if self.by_pattern and values != []:
            return False
        if values is not None:
            self._only([value for value in values if isinstance(value, str)])
            return True
        regex = None if self.named else _name_pattern(rewriter, words, at)
        if regex:
            self.by_pattern, self.others = {regex: self.others}, False
        return regex is not None

    def _only(self, names: list[str]) -> None:
        self.named = {name: schema if name in names else False for name, schema in self.named.items()}
        self.named |= {name: self.others for name in names if name not in self.named}
        self.others = False
        self.by_pattern = {}


def object_keywords(
    rewriter: Rewrites, words: dict[str, Any], types: list[str] | None, here: Here
) -> tuple[Schema, list[Schema]]:
    """The keywords of objects, and what holds beside them. False: no object satisfies them."""
    members = _Members(rewriter, words, here)
    least, most = integer_of(words, "minProperties", here, 0) or 0, integer_of(words, "maxProperties", here)
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
        # The library excludes named members from the others by their plain spelling, and takes "\u0061" for another
        # name than "a". Where others are members by a pattern, it has one spelling for each name.
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
    rewriter: Rewrites, members: _Members, least: int, kind: dict[str, Any], counts: dict[str, Any], here: Here
) -> list[Schema]:
    """`minProperties`, where more than the required members are asked for."""
    more = least - len(members.required)
    optional = members.optional
    if members.closed:
        if more > len(optional):
            return [False]
        if comb(len(optional), more) <= _MOST_CHOICES:
            return [any_of([{**kind, "required": list(names)} for names in combinations(optional, more)])]
    elif more == 1 and not optional and not here.joined:
        counts["minProperties"] = least
        return []
    # A model may write the same name twice among those that aren't named: two such members may count as one.
    rewriter.skip("minProperties", here)
    return []


def _at_most(
    rewriter: Rewrites, members: _Members, most: int, kind: dict[str, Any], counts: dict[str, Any], here: Here
) -> list[Schema]:
    """`maxProperties`."""
    optional = members.optional
    fewer = len(optional) - (most - len(members.required))  # that can't be there
    if members.closed:
        if fewer <= 0:
            return []
        if comb(len(optional), fewer) <= _MOST_CHOICES:
            choices = combinations(optional, fewer)
            return [any_of([{**kind, "properties": dict.fromkeys(names, False)} for names in choices])]
    elif not optional and not here.joined:
        counts["maxProperties"] = most
        return []
    rewriter.skip("maxProperties", here)
    return []


def _name_pattern(rewriter: Rewrites, words: dict[str, Any], here: Here) -> str | None:
    """A pattern for the names that satisfy a schema; empty for all, None where no pattern says it."""
    keywords = words.keys() - {"type"}
    if keywords == {"pattern"}:
        return pattern_of(rewriter, words["pattern"], "pattern", here)
    if keywords <= {"minLength", "maxLength"}:
        least, most = integer_of(words, "minLength", here, 0), integer_of(words, "maxLength", here)
        return f"^(?s:.{{{least},{'' if most is None else most}}})$"
    if keywords == {"format"} and isinstance(words["format"], str):
        found = format_keywords(words["format"])
        return None if found is None else found.get("pattern", "" if not found else None)
    return None


def _evaluated(rewriter: Rewrites, words: dict[str, Any], here: Here, depth: int = 8) -> set[str] | None:
    """The names of members that a schema and what it applies speak of; None where that depends on the value."""
    if depth == 0 or any(name in words for name in ("anyOf", "oneOf", "if", "dependentSchemas", "dependencies")):
        return None
    if words.keys() & {"$dynamicRef", "$recursiveRef"}:
        return None
    names = set(mapping_of(words, "properties", here))
    inner = [(node, here) for node in words.get("allOf", [])]
    if "$ref" in words:
        target = rewriter.target("$ref", words["$ref"], here)
        inner.append((target.node, here.at(target)))
    for node, at in [rewriter.followed(*each) for each in inner]:
        if not isinstance(node, dict):
            continue
        found = rewriter.words(node)
        if found.keys() & {"patternProperties", "additionalProperties", "unevaluatedProperties"}:
            return None
        below = _evaluated(rewriter, found, at, depth - 1)
        if below is None:
            return None
        names |= below
    return names
