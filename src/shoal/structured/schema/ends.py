"""Which definitions of a schema have a value at all: what requires itself has no finite one."""

from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

from shoal.structured.schema.node import Schema, all_of, any_of

_PREFIX = "#/$defs/"
_NEVER = ""  # the name of no definition: what no value satisfies


def endless(root: Schema, definitions: Mapping[str, Schema]) -> bool:
    """Whether all that the schema allows refers to itself without an end."""
    return bool(_missing(root, _finite(definitions, {_NEVER})))


def possible(root: Schema, definitions: Mapping[str, Schema]) -> tuple[Schema, dict[str, Schema]]:
    """The same schema without definitions that no value satisfies, which the library takes for one that can't be
    obeyed even where they may be left out.

    Args:
        root, definitions: as `Rewriter.run` gives them; it is quick where what refers to nothing comes first.
    """
    finite = _finite(definitions, set())
    if _missing(root, finite):
        return False, {}
    never = definitions.keys() - finite
    if not never:
        return root, dict(definitions)
    return _without(root, never), {name: _without(definitions[name], never) for name in definitions if name in finite}


def _finite(definitions: Mapping[str, Schema], finite: set[str]) -> set[str]:
    """The least fixed point: a definition has a value if one can be built from those that are known to have one."""
    waiting: defaultdict[str, set[str]] = defaultdict(set)
    pending = list(definitions)[::-1]
    while pending:
        name = pending.pop()
        if name in finite:
            continue
        missing = _missing(definitions[name], finite)
        if not missing:
            finite.add(name)
            pending.extend(waiting.pop(name, ()))
        for other in missing:
            waiting[other].add(name)
    return finite


def _missing(schema: Any, finite: set[str]) -> set[str]:
    """Definitions that a value has to be built from, as far as they aren't known to have one: empty if there is one.

    Of alternatives that all lack some, what each lacks: whichever comes first may decide. What no value satisfies for
    another reason counts as if one did; the library finds that out.
    """
    if schema is False:
        return {_NEVER} - finite
    if not isinstance(schema, dict) or "enum" in schema:
        return set()
    found: set[str] = set()
    reference = schema.get("$ref")
    if isinstance(reference, str) and (name := reference.removeprefix(_PREFIX)) not in finite:
        found.add(name)
    if "anyOf" in schema:
        alternatives = [_missing(each, finite) for each in schema["anyOf"]]
        if all(alternatives):
            found.update(*alternatives)
    for part in [*schema.get("allOf", ()), *_required(schema)]:
        found |= _missing(part, finite)
    return found


def _required(schema: dict[str, Any]) -> list[Any]:
    """The schemas of what every value contains."""
    if schema.get("type") == "object":
        named = schema.get("properties", {})
        return [named[name] for name in schema.get("required", ()) if name in named]
    if schema.get("type") == "array":
        least, first = schema.get("minItems", 0), schema.get("prefixItems", [])
        return [*first[:least], *([schema.get("items", True)] if least > len(first) else [])]
    return []


def _without(schema: Schema, never: Collection[str]) -> Schema:
    """A schema in whose place of references to some definitions there is what no value satisfies."""
    if not isinstance(schema, dict):
        return schema
    if schema.get("$ref", _PREFIX).removeprefix(_PREFIX) in never:
        return False
    if "allOf" in schema:
        return all_of([_without(each, never) for each in schema["allOf"]])
    if "anyOf" in schema:
        return any_of([_without(each, never) for each in schema["anyOf"]])
    found = dict(schema)
    for name in ("properties", "patternProperties"):
        if name in found:
            found[name] = {key: _without(each, never) for key, each in found[name].items()}
    for name in ("items", "additionalProperties"):
        if name in found:
            found[name] = _without(found[name], never)
    if "prefixItems" in found:
        found["prefixItems"] = [_without(each, never) for each in found["prefixItems"]]
    return found
