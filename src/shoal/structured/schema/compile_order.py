"""The order in which llguidance compiles the definitions of a schema, and how deeply it recurses while doing so."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from shoal.structured.schema.node import Schema

_PREFIX = "#/$defs/"
_MAPS = ("properties", "patternProperties")
_ONE = ("additionalProperties", "items")
_LISTS = ("allOf", "anyOf", "prefixItems")


def compile_order(root: Schema, definitions: Mapping[str, Schema]) -> tuple[int, list[str]]:
    """Return the largest number of schemas that are compiled inside each other, and the order of the definitions.

    The order is that in which their compilation ends. Each definition is compiled once, at the first reference to it.
    """
    met: set[str] = set()
    done: list[str] = []
    deepest = 0
    stack: list[tuple[Iterator[Any], str]] = [(iter([root]), "")]
    while stack:
        children, name = stack[-1]
        child = next(children, None)
        if child is None:
            stack.pop()
            if name:
                done.append(name)
            continue
        inside, met_name = _children(child), ""
        if isinstance(child, dict) and isinstance(child.get("$ref"), str):
            met_name = child["$ref"].removeprefix(_PREFIX)
            if met_name in met or met_name not in definitions:
                continue
            met.add(met_name)
            inside = iter([definitions[met_name]])
        stack.append((inside, met_name))
        deepest = max(deepest, len(stack))
    return deepest, done


def leaves_first(order: Sequence[str]) -> dict[str, Any]:
    """Return a schema that no value satisfies and that refers to the definitions in this order."""
    members = {str(i): {"$ref": f"{_PREFIX}{name}"} for i, name in enumerate(order)}
    return {"type": "object", "properties": members, "minProperties": 2, "maxProperties": 1}


def _children(schema: Any) -> Iterator[Any]:
    """Yield the subschemas directly inside a schema, in the order in which the library compiles them."""
    if not isinstance(schema, dict):
        return
    for name in _LISTS:
        yield from schema.get(name, ())
    for name in _MAPS:
        yield from schema.get(name, {}).values()
    for name in _ONE:
        if name in schema:
            yield schema[name]
