"""Keywords that hold under a condition: `if`, `not`, `dependentRequired` and their like, as alternatives."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from shoal.structured.schema.finite import finite_values
from shoal.structured.schema.literals import is_plain, listed_schema
from shoal.structured.schema.node import (
    TYPES,
    Here,
    Read,
    Rewrites,
    Schema,
    all_of,
    any_of,
    distinct,
    identity,
    malformed,
    mapping_of,
    names_of,
    types_of,
)

_MOST_ALTERNATIVES = 4  # conditions beside each other: each doubles what the library has to look at
_TRIVIAL: tuple[Any, ...] = (True, {})


def _if(rewriter: Rewrites, words: dict[str, Any], here: Here) -> list[Schema]:
    condition, then, otherwise = words["if"], words.get("then", True), words.get("else", True)
    if then in _TRIVIAL and otherwise in _TRIVIAL:
        return []
    if isinstance(condition, bool) or condition == {}:
        chosen = "else" if condition is False else "then"
        return [rewriter.child(words.get(chosen, True), here, chosen, joined=True)]
    case = _case(rewriter, words, here)
    if case is None:
        rewriter.skip("if", here, "where it is not about a property of few values")
        return []
    return [_cases([case])]


def conditions_together(rewriter: Rewrites, nodes: list[Any], here: Here) -> tuple[list[Schema], set[int]]:
    """Of schemas in an `allOf`, those that are a condition and nothing else, and their numbers.

    All that are about one property make up one list of alternatives, not each one of its own: of ten lists beside each
    other the library would have to look at all combinations.
    """
    found: dict[str, list[_Case]] = {}
    numbers: set[int] = set()
    for i, node in enumerate(nodes):
        words = rewriter.words(node) if isinstance(node, dict) else {}
        if "if" in words and words.keys() <= {"if", "then", "else"} and not isinstance(words["if"], bool):
            case = _case(rewriter, words, here.under("allOf", i, joined=True))
            if case is None:
                continue
            numbers.add(i)
            if case.name in found or len(found) < _MOST_ALTERNATIVES:
                found.setdefault(case.name, []).append(case)
            else:
                rewriter.skip("if", here.under("allOf", i), f"about more than {_MOST_ALTERNATIVES} properties")
    return [_cases(cases) for cases in found.values()], numbers


@dataclass(frozen=True, slots=True)
class _Case:
    """A condition on one property: it has one of some values, or (unless `needed`) is not there."""

    name: str
    wanted: set[Any]  # identities of values
    needed: bool
    then: Schema
    otherwise: Schema
    values: list[Any]  # that the property may have
    required: bool


def _case(rewriter: Rewrites, words: dict[str, Any], here: Here) -> _Case | None:
    tag = _tag(rewriter, words["if"], here.under("if"))
    around = [words, *here.around]
    if tag is None or not any(types_of(each, here) == ["object"] for each in around):
        return None
    name, wanted, needed = tag
    properties = [mapping_of(each, "properties", here) for each in around]
    known = [finite_values(rewriter, each[name], here.under("properties", name)) for each in properties if name in each]
    values = next((each for each in known if each is not None), None)
    if values is None or not is_plain(values):
        return None
    inside = replace(here, around=tuple(around))
    then = rewriter.child(words.get("then", True), inside, "then", joined=True)
    otherwise = rewriter.child(words.get("else", True), inside, "else", joined=True)
    required = name in chain.from_iterable(names_of(each.get("required", []), "required", here) for each in around)
    return _Case(name, set(map(identity, wanted)), needed, then, otherwise, distinct(values), required)


def _cases(cases: list[_Case]) -> Schema:
    """Conditions on one property, as alternatives: one for all values that fulfil the same of them."""
    first = cases[0]
    alike: dict[tuple[bool, ...], list[Any]] = {}
    for value in first.values:
        alike.setdefault(tuple(identity(value) in case.wanted for case in cases), []).append(value)
    found = [
        all_of([_object({first.name: listed_schema(values)}, [first.name]), *_outcomes(cases, fulfilled)])
        for fulfilled, values in alike.items()
    ]
    if not first.required:
        outcomes = _outcomes(cases, [not case.needed for case in cases])
        found.append(all_of([_object({first.name: False}, []), *outcomes]))
    return any_of(found)


def _outcomes(cases: list[_Case], fulfilled: Sequence[bool]) -> list[Schema]:
    return [case.then if yes else case.otherwise for case, yes in zip(cases, fulfilled, strict=True)]


def _tag(rewriter: Rewrites, condition: Any, here: Here) -> tuple[str, list[Any], bool] | None:
    """The one property that a condition is about, its values, and whether it has to be there."""
    condition, here = rewriter.followed(condition, here)
    words = rewriter.words(condition) if isinstance(condition, dict) else {}
    properties = mapping_of(words, "properties", here)
    if len(properties) != 1 or not words.keys() <= {"type", "properties", "required"}:
        return None
    if words.get("type", "object") != "object":
        return None
    ((name, node),) = properties.items()
    required = names_of(words.get("required", []), "required", here)
    values = finite_values(rewriter, node, here.under("properties", name))
    if values is None or not is_plain(values) or not set(required) <= {name}:
        return None
    return name, values, bool(required)


def _object(properties: dict[str, Schema], required: list[str]) -> Schema:
    return {"type": "object", "properties": properties, **({"required": required} if required else {})}


def _nothing(_: Rewrites, __: dict[str, Any], ___: Here) -> list[Schema]:
    return []


def _not(rewriter: Rewrites, words: dict[str, Any], here: Here) -> list[Schema]:
    node, at = rewriter.followed(words["not"], here.under("not"))
    if isinstance(node, bool):
        return [not node]
    if not isinstance(node, dict):
        raise malformed("not", here, "be a schema", node)
    inner = rewriter.words(node)
    if not inner:
        return [False]
    types = types_of(inner, at)
    if inner.keys() <= {"type"} and types is not None and types.count("integer") == 0:
        left = [name for name in TYPES if name not in types]
        return [{"type": left} if left else False]
    if inner.keys() == {"required"}:
        names = names_of(inner["required"], "required", at)
        return [any_of([_object({name: False}, []) for name in names])]
    unwanted = finite_values(rewriter, node, at)
    wanted = finite_values(rewriter, {name: words[name] for name in words if name in ("type", "enum", "const")}, here)
    if unwanted is not None and wanted is not None and is_plain(wanted):
        never = set(map(identity, unwanted))
        left_over = [value for value in wanted if identity(value) not in never]
        return [listed_schema(left_over)]
    rewriter.skip("not", here)
    return []


def _dependent_required(rewriter: Rewrites, words: dict[str, Any], here: Here) -> list[Schema]:
    return _dependent(rewriter, words, "dependentRequired", here)


def _dependent_schemas(rewriter: Rewrites, words: dict[str, Any], here: Here) -> list[Schema]:
    return _dependent(rewriter, words, "dependentSchemas", here)


def _dependencies(rewriter: Rewrites, words: dict[str, Any], here: Here) -> list[Schema]:
    return _dependent(rewriter, words, "dependencies", here)


def _dependent(rewriter: Rewrites, words: dict[str, Any], keyword: str, here: Here) -> list[Schema]:
    """What has to be there, or to hold, where a property is: either that, or there is no such property."""
    binding = {name: value for name, value in mapping_of(words, keyword, here).items() if value not in (*_TRIVIAL, [])}
    if len(binding) > _MOST_ALTERNATIVES:
        rewriter.skip(keyword, here, f"with more than {_MOST_ALTERNATIVES} properties")
        return []
    kind = {"type": "object"} if types_of(words, here) == ["object"] else {}
    found: list[Schema] = []
    for name, value in binding.items():
        absent: Schema = {**kind, "properties": {name: False}}
        if isinstance(value, list) and keyword != "dependentSchemas":
            present: Schema = {**kind, "required": list(dict.fromkeys([name, *names_of(value, keyword, here)]))}
        else:
            there: Schema = {**kind, "required": [name]}
            present = all_of([there, rewriter.child(value, here, keyword, name, joined=True)])
        found.append(any_of([absent, present]))
    return found


CONDITIONS: dict[str, Read] = {
    "if": _if,
    "then": _nothing,
    "else": _nothing,
    "not": _not,
    "dependentRequired": _dependent_required,
    "dependentSchemas": _dependent_schemas,
    "dependencies": _dependencies,
}
