"""Preparing a JSON schema for llguidance: the result is a schema that it obeys exactly as JSON Schema means it.

A prepared schema can be compiled without crashing the process and, because its depth is bounded, without a stack
overflow. A schema that cannot be prepared is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shoal.structured.schema.compile_order import compile_order, leaves_first
from shoal.structured.schema.node import Schema
from shoal.structured.schema.read_schema import read_schema
from shoal.structured.schema.rewriting import Rewriter
from shoal.structured.schema.satisfiable import is_endless, remove_unsatisfiable
from shoal.structured.schema.schema_error import schema_error

_MAX_LEVELS = 500  # recursive calls inside the library: at 2,000 it overflows a stack of 8 MiB
_HARMLESS_DEPTH = 100  # up to this depth the order of compilation does not matter


@dataclass(frozen=True, slots=True)
class PreparedSchema:
    """A schema that has only keywords which llguidance obeys exactly; `grammar_json` makes a grammar of it."""

    schema: dict[str, Any]
    dropped: tuple[str, ...] = ()  # unsupported keywords that were left out, each with its place: "not at #/items"


def prepare(schema: Any, *, strict: bool) -> PreparedSchema:
    """Return the schema rewritten so that llguidance obeys it.

    Args:
        schema: the JSON schema, as an object or as text.
        strict: whether an unsupported keyword is an error. Otherwise it is left out and named in `dropped`.

    Raises:
        RequestError: the input is not a JSON schema, it is nested too deeply, a reference leads outside the schema or
            endlessly back to itself, no value satisfies the schema, or a keyword or number is not supported.
    """
    rewriter = Rewriter(read_schema(schema), strict=strict)
    root, definitions = rewriter.run()
    _, order = compile_order(root, definitions)
    whole = {name: definitions[name] for name in order}  # definitions without references come first
    found, definitions = remove_unsatisfiable(root, whole)
    if found is False:
        why = ", because what it requires refers to itself without end" if is_endless(root, whole) else ""
        raise schema_error(f"can't be obeyed: no text satisfies the schema{why}")
    return PreparedSchema(_with_bounded_depth(found, definitions), tuple(rewriter.dropped))


def summarize_keywords(dropped: Sequence[str], max_length: int) -> str:
    """Return the dropped keywords and their places as one line of ASCII of at most `max_length` characters.

    A line that would be longer ends in the number of keywords that it leaves out.
    """
    texts = [each.encode("ascii", "backslashreplace").decode().replace(",", "%2C") for each in dropped]
    texts = ["".join(char if " " <= char <= "~" else "?" for char in text) for text in texts]
    kept = len(texts)
    while kept and len(", ".join(texts[:kept])) > max_length - 20:
        kept -= 1
    if kept == len(texts):
        return ", ".join(texts)
    return ", ".join([*texts[:kept], f"and {len(texts) - kept} more"])


def _with_bounded_depth(root: Schema, definitions: dict[str, Schema]) -> dict[str, Any]:
    """Return one schema with its definitions, in which the library nests the compilation of definitions only so deep.

    The library compiles a definition at the first reference to it, inside whatever it is compiling at that moment. In
    a deep schema an alternative that no value satisfies is therefore put first: it refers to all definitions, those
    without references first, so that each is compiled when everything it refers to has been.
    """
    depth, order = compile_order(root, definitions)
    whole: dict[str, Any] = {} if root is True else dict(root) if isinstance(root, dict) else {}
    if depth > _HARMLESS_DEPTH and definitions:
        first = leaves_first(order)
        whole = {"anyOf": [first, whole]}
        depth, _ = compile_order(whole, definitions)
    if depth > _MAX_LEVELS:
        raise schema_error(f"is nested too deeply ({depth} levels including its references, {_MAX_LEVELS} are allowed)")
    return {**whole, "$defs": definitions} if definitions else whole
