"""Finding the definitions of a schema that no value satisfies, as those that require themselves.

An object that must contain an object of the same kind would be infinite, so no value has that type.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

from shoal.structured.schema.node import Schema, all_of, any_of

_PREFIX = "#/$defs/"
_NEVER = ""  # stands for the schema `false`, which no value satisfies; no definition has this name


def is_endless(root: Schema, definitions: Mapping[str, Schema]) -> bool:
    """Return whether no value satisfies the schema only because everything it allows requires itself endlessly."""
    return bool(_missing(root, _finite(definitions, {_NEVER})))


def remove_unsatisfiable(root: Schema, definitions: Mapping[str, Schema]) -> tuple[Schema, dict[str, Schema]]:
    """Return the same schema without the definitions that no value satisfies.

    The library would refuse the whole schema because of such a definition, even if it is used only in optional places.
    The root is False if no value satisfies the schema.

    Args:
        root, definitions: as `Rewriter.run` returns them. This is fast if definitions without references come first.
    """
    finite = _finite(definitions, set())
    if _missing(root, finite):
        return False, {}
    unsatisfiable = definitions.keys() - finite
    if not unsatisfiable:
        return root, dict(definitions)
    return _remove(root, unsatisfiable), {
        name: _remove(definitions[name], unsatisfiable) for name in definitions if name in finite
    }


def _finite(definitions: Mapping[str, Schema], finite: set[str]) -> set[str]:
    """Add to `finite` the definitions that a value satisfies, and return it.

    This is a least fixed point: a definition has a value if one can be built from definitions known to have one.
    """
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
    """Return the definitions that a value needs and that are not known to have a value; empty if a value exists.

    If every alternative of an `anyOf` lacks some definitions, those of all alternatives are returned, since any of
    them may be found first. A schema that is unsatisfiable for another reason counts as satisfiable here; the library
    detects that itself.
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
    """Return the schemas of the members or items that every value of this schema contains."""
    if schema.get("type") == "object":
        named = schema.get("properties", {})
        return [named[name] for name in schema.get("required", ()) if name in named]
    if schema.get("type") == "array":
        least, first = schema.get("minItems", 0), schema.get("prefixItems", [])
        return [*first[:least], *([schema.get("items", True)] if least > len(first) else [])]
    return []


def _remove(schema: Schema, unsatisfiable: Collection[str]) -> Schema:
    """Return the schema with each reference to one of these definitions replaced by `false`."""
    if not isinstance(schema, dict):
        return schema
    if schema.get("$ref", _PREFIX).removeprefix(_PREFIX) in unsatisfiable:
        return False
    if "allOf" in schema:
        return all_of([_remove(each, unsatisfiable) for each in schema["allOf"]])
    if "anyOf" in schema:
        return any_of([_remove(each, unsatisfiable) for each in schema["anyOf"]])
    found = dict(schema)
    for name in ("properties", "patternProperties"):
        if name in found:
            found[name] = {key: _remove(each, unsatisfiable) for key, each in found[name].items()}
    for name in ("items", "additionalProperties"):
        if name in found:
            found[name] = _remove(found[name], unsatisfiable)
    if "prefixItems" in found:
        found["prefixItems"] = [_remove(each, unsatisfiable) for each in found["prefixItems"]]
    return found
