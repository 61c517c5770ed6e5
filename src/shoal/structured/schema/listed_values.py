"""Finding all values of a schema that lists them, by `enum`, `const` or a type with few values."""

from typing import Any

from shoal.structured.schema.node import Location, SchemaRewriter, has_type, read_types

_LISTING = {"type", "enum", "const", "nullable"}


def listed_values(rewriter: SchemaRewriter, node: Any, here: Location) -> list[Any] | None:
    """Return all values that satisfy the schema, or None if it does not list them or has other keywords too."""
    node, here = rewriter.follow(node, here)
    if not isinstance(node, dict):
        return [] if node is False else None
    keywords = rewriter.keywords(node)
    if not keywords.keys() <= _LISTING:
        return None
    types = read_types(keywords, here)
    if "const" in keywords or isinstance(keywords.get("enum"), list):
        from_enum = keywords.get("enum", [keywords.get("const")])
        if "const" in keywords and "enum" in keywords:
            return None
        return [value for value in from_enum if types is None or has_type(value, types)]
    if types is not None and set(types) <= {"boolean", "null"}:
        return [*([False, True] if "boolean" in types else []), *([None] if "null" in types else [])]
    return None
