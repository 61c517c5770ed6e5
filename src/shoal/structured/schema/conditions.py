"""Rewriting conditional keywords (`if`, `not`, `dependentRequired` and similar ones) as alternatives."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from shoal.structured.schema.listed_values import listed_values
from shoal.structured.schema.literals import enum_schema, is_plain
from shoal.structured.schema.node import (
    TYPES,
    KeywordReader,
    Location,
    Schema,
    SchemaRewriter,
    all_of,
    any_of,
    distinct,
    identity,
    malformed,
    read_names,
    read_object,
    read_types,
)

_MAX_ALTERNATIVES = 4  # conditions that must hold together: each doubles the combinations that the library tries
_TRIVIAL: tuple[Any, ...] = (True, {})


def _if(rewriter: SchemaRewriter, keywords: dict[str, Any], here: Location) -> list[Schema]:
    condition, then, otherwise = keywords["if"], keywords.get("then", True), keywords.get("else", True)
    if then in _TRIVIAL and otherwise in _TRIVIAL:
        return []
    if isinstance(condition, bool) or condition == {}:
        chosen = "else" if condition is False else "then"
        return [rewriter.rewrite_child(keywords.get(chosen, True), here, chosen, joined=True)]
    case = _read_case(rewriter, keywords, here)
    if case is None:
        rewriter.drop_keyword("if", here, "unless it is about one property with few values")
        return []
    return [_alternatives([case])]


def combine_conditions(rewriter: SchemaRewriter, nodes: list[Any], here: Location) -> tuple[list[Schema], set[int]]:
    """Rewrite those schemas of an `allOf` that are an `if` and nothing else.

    All conditions on the same property become one list of alternatives. With one list for each of ten conditions, the
    library would have to try all combinations.

    Returns:
        One schema for each property, and the indices in `nodes` of the conditions that these cover.
    """
    found: dict[str, list[_Case]] = {}
    covered: set[int] = set()
    for i, node in enumerate(nodes):
        keywords = rewriter.keywords(node) if isinstance(node, dict) else {}
        if "if" in keywords and keywords.keys() <= {"if", "then", "else"} and not isinstance(keywords["if"], bool):
            case = _read_case(rewriter, keywords, here.under("allOf", i, joined=True))
            if case is None:
                continue
            covered.add(i)
            if case.name in found or len(found) < _MAX_ALTERNATIVES:
                found.setdefault(case.name, []).append(case)
            else:
                rewriter.drop_keyword("if", here.under("allOf", i), f"about more than {_MAX_ALTERNATIVES} properties")
    return [_alternatives(cases) for cases in found.values()], covered


@dataclass(frozen=True, slots=True)
class _Case:
    """An `if` on one property. It holds if the property has a wanted value, or is absent and not `needed`."""

    name: str  # of the property
    wanted: set[Any]  # `identity` of each value for which the condition holds
    needed: bool  # the condition does not hold for an object without the property
    then: Schema
    otherwise: Schema
    values: list[Any]  # all values that the property may have
    required: bool  # the schema allows no object without the property


def _read_case(rewriter: SchemaRewriter, keywords: dict[str, Any], here: Location) -> _Case | None:
    """Return an `if` with its `then` and `else`, or None unless it is about one property with few values."""
    condition = _read_condition(rewriter, keywords["if"], here.under("if"))
    around = [keywords, *here.around]
    if condition is None or not any(read_types(each, here) == ["object"] for each in around):
        return None
    name, wanted, needed = condition
    properties = [read_object(each, "properties", here) for each in around]
    known = [listed_values(rewriter, each[name], here.under("properties", name)) for each in properties if name in each]
    values = next((each for each in known if each is not None), None)
    if values is None or not is_plain(values):
        return None
    inside = replace(here, around=tuple(around))
    then = rewriter.rewrite_child(keywords.get("then", True), inside, "then", joined=True)
    otherwise = rewriter.rewrite_child(keywords.get("else", True), inside, "else", joined=True)
    required = name in chain.from_iterable(read_names(each.get("required", []), "required", here) for each in around)
    return _Case(name, set(map(identity, wanted)), needed, then, otherwise, distinct(values), required)


def _alternatives(cases: list[_Case]) -> Schema:
    """Return conditions on one property as alternatives: one for each set of values that meet the same conditions."""
    first = cases[0]
    alike: dict[tuple[bool, ...], list[Any]] = {}
    for value in first.values:
        alike.setdefault(tuple(identity(value) in case.wanted for case in cases), []).append(value)
    found = [
        all_of([_object({first.name: enum_schema(values)}, [first.name]), *_outcomes(cases, fulfilled)])
        for fulfilled, values in alike.items()
    ]
    if not first.required:
        outcomes = _outcomes(cases, [not case.needed for case in cases])
        found.append(all_of([_object({first.name: False}, []), *outcomes]))
    return any_of(found)


def _outcomes(cases: list[_Case], fulfilled: Sequence[bool]) -> list[Schema]:
    """Return the `then` or `else` of each condition."""
    return [case.then if yes else case.otherwise for case, yes in zip(cases, fulfilled, strict=True)]


def _read_condition(rewriter: SchemaRewriter, condition: Any, here: Location) -> tuple[str, list[Any], bool] | None:
    """Return the property that a condition is about, the values it asks for, and whether it requires the property.

    None if the condition is about anything else.
    """
    condition, here = rewriter.follow(condition, here)
    keywords = rewriter.keywords(condition) if isinstance(condition, dict) else {}
    properties = read_object(keywords, "properties", here)
    if len(properties) != 1 or not keywords.keys() <= {"type", "properties", "required"}:
        return None
    if keywords.get("type", "object") != "object":
        return None
    ((name, node),) = properties.items()
    required = read_names(keywords.get("required", []), "required", here)
    values = listed_values(rewriter, node, here.under("properties", name))
    if values is None or not is_plain(values) or not set(required) <= {name}:
        return None
    return name, values, bool(required)


def _object(properties: dict[str, Schema], required: list[str]) -> Schema:
    return {"type": "object", "properties": properties, **({"required": required} if required else {})}


def _handled_by_if(_: SchemaRewriter, __: dict[str, Any], ___: Location) -> list[Schema]:
    return []


def _not(rewriter: SchemaRewriter, keywords: dict[str, Any], here: Location) -> list[Schema]:
    node, at = rewriter.follow(keywords["not"], here.under("not"))
    if isinstance(node, bool):
        return [not node]
    if not isinstance(node, dict):
        raise malformed("not", here, "be a schema", node)
    inner = rewriter.keywords(node)
    if not inner:
        return [False]
    types = read_types(inner, at)
    if inner.keys() <= {"type"} and types is not None and types.count("integer") == 0:
        left = [name for name in TYPES if name not in types]
        return [{"type": left} if left else False]
    if inner.keys() == {"required"}:
        names = read_names(inner["required"], "required", at)
        return [any_of([_object({name: False}, []) for name in names])]
    unwanted = listed_values(rewriter, node, at)
    wanted = listed_values(
        rewriter, {name: keywords[name] for name in keywords if name in ("type", "enum", "const")}, here
    )
    if unwanted is not None and wanted is not None and is_plain(wanted):
        never = set(map(identity, unwanted))
        left_over = [value for value in wanted if identity(value) not in never]
        return [enum_schema(left_over)]
    rewriter.drop_keyword("not", here)
    return []


def _dependent_required(rewriter: SchemaRewriter, keywords: dict[str, Any], here: Location) -> list[Schema]:
    return _dependent(rewriter, keywords, "dependentRequired", here)


def _dependent_schemas(rewriter: SchemaRewriter, keywords: dict[str, Any], here: Location) -> list[Schema]:
    return _dependent(rewriter, keywords, "dependentSchemas", here)


def _dependencies(rewriter: SchemaRewriter, keywords: dict[str, Any], here: Location) -> list[Schema]:
    return _dependent(rewriter, keywords, "dependencies", here)


def _dependent(rewriter: SchemaRewriter, keywords: dict[str, Any], keyword: str, here: Location) -> list[Schema]:
    """Rewrite a keyword by which a property requires others: either the property is absent, or they are satisfied."""
    binding = {
        name: value for name, value in read_object(keywords, keyword, here).items() if value not in (*_TRIVIAL, [])
    }
    if len(binding) > _MAX_ALTERNATIVES:
        rewriter.drop_keyword(keyword, here, f"with more than {_MAX_ALTERNATIVES} properties")
        return []
    kind = {"type": "object"} if read_types(keywords, here) == ["object"] else {}
    found: list[Schema] = []
    for name, value in binding.items():
        absent: Schema = {**kind, "properties": {name: False}}
        if isinstance(value, list) and keyword != "dependentSchemas":
            present: Schema = {**kind, "required": list(dict.fromkeys([name, *read_names(value, keyword, here)]))}
        else:
            there: Schema = {**kind, "required": [name]}
            present = all_of([there, rewriter.rewrite_child(value, here, keyword, name, joined=True)])
        found.append(any_of([absent, present]))
    return found


CONDITIONS: dict[str, KeywordReader] = {
    "if": _if,
    "then": _handled_by_if,
    "else": _handled_by_if,
    "not": _not,
    "dependentRequired": _dependent_required,
    "dependentSchemas": _dependent_schemas,
    "dependencies": _dependencies,
}
