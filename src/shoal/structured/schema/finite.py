"""Which values a schema lists, where it does."""

from typing import Any

from shoal.structured.schema.node import Here, Rewrites, has_type, types_of

_BESIDE = {"type", "enum", "const", "nullable"}


def finite_values(rewriter: Rewrites, node: Any, here: Here) -> list[Any] | None:
    """All values that satisfy a schema of `enum`, `const` or a type of few values; None for any other."""
    node, here = rewriter.followed(node, here)
    if not isinstance(node, dict):
        return [] if node is False else None
    words = rewriter.words(node)
    if not words.keys() <= _BESIDE:
        return None
    types = types_of(words, here)
    if "const" in words or isinstance(words.get("enum"), list):
        from_enum = words.get("enum", [words.get("const")])
        if "const" in words and "enum" in words:
            return None
        return [value for value in from_enum if types is None or has_type(value, types)]
    if types is not None and set(types) <= {"boolean", "null"}:
        return [*([False, True] if "boolean" in types else []), *([None] if "null" in types else [])]
    return None
