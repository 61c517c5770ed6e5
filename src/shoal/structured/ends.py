"""Whether some finite value may satisfy a schema, as far as its references are concerned."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from shoal.structured.node import Schema

_PREFIX = "#/$defs/"


def has_value(root: Schema, definitions: Mapping[str, Schema]) -> bool:
    """The least fixed point: a definition has a finite value if one can be built from those that are known to.

    Args:
        root, definitions: as `Rewriter.run` gives them; it is quick where what refers to nothing comes first.
    """
    finite: set[str] = set()
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
    return not _missing(root, finite)


def _missing(schema: Any, finite: set[str]) -> set[str]:
    """Definitions that a value has to be built from, as far as they aren't known to have one: empty if there is one.

    Of alternatives that all lack some, what each lacks: whichever comes first may decide. What no value satisfies for
    another reason counts as if one did; the library finds that out.
    """
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
