"""JSON schemas made ready for llguidance: one that it obeys exactly as JSON Schema means it, or a refusal.

What comes out neither ends the process it is compiled in nor runs it out of stack: its depth is known.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shoal.errors import RequestError
from shoal.structured.schema.ends import endless, possible
from shoal.structured.schema.node import Schema
from shoal.structured.schema.order import compiled_depth, leaves_first
from shoal.structured.schema.reading import read_schema
from shoal.structured.schema.rewriting import Rewriter

_MOST_LEVELS = 500  # that the library may call itself: at 2,000 it runs out of a stack of 8 MiB
_SHALLOW = 100  # levels that need no thought


@dataclass(frozen=True, slots=True)
class PreparedSchema:
    """A schema in the words that llguidance obeys, for `composing.grammar_of`."""

    schema: dict[str, Any]
    dropped: tuple[str, ...] = ()  # keywords that it goes without, each with its place: "uniqueItems at #/items"


def prepare(schema: Any, *, strict: bool) -> PreparedSchema:
    """
    Args:
        schema: an object, or its text.
        strict: a keyword that can't be obeyed is an error.

    Raises:
        RequestError: it is no JSON schema, is nested too deeply, refers to what isn't in it or to itself without an
            end, no value satisfies it, or a keyword or a number can't be obeyed.
    """
    rewriter = Rewriter(read_schema(schema), strict=strict)
    root, definitions = rewriter.run()
    _, order = compiled_depth(root, definitions)  # what refers to nothing comes first
    whole = {name: definitions[name] for name in order}
    found, definitions = possible(root, whole)
    if found is False:
        why = ", for what it requires refers to itself without an end" if endless(root, whole) else ""
        raise RequestError(f"structured_outputs.json can't be obeyed: no text satisfies the schema{why}")
    return PreparedSchema(_shallow(found, definitions), tuple(rewriter.dropped))


def listed(dropped: Sequence[str], most: int) -> str:
    """Keywords with their places in one line of ASCII of at most so many characters; of what is left out, how many."""
    texts = [each.encode("ascii", "backslashreplace").decode().replace(",", "%2C") for each in dropped]
    texts = ["".join(char if " " <= char <= "~" else "?" for char in text) for text in texts]
    kept = len(texts)
    while kept and len(", ".join(texts[:kept])) > most - 20:
        kept -= 1
    if kept == len(texts):
        return ", ".join(texts)
    return ", ".join([*texts[:kept], f"and {len(texts) - kept} more"])


def _shallow(root: Schema, definitions: dict[str, Schema]) -> dict[str, Any]:
    """One schema, of which the library compiles no definition far inside of others.

    It compiles a definition where it first meets a reference to it, inside of whatever it is compiling. So it is made
    to meet those first that refer to nothing: in an alternative that nothing satisfies.
    """
    depth, order = compiled_depth(root, definitions)
    whole: dict[str, Any] = {} if root is True else dict(root) if isinstance(root, dict) else {}
    if depth > _SHALLOW and definitions:
        first = leaves_first(order)
        whole = {"anyOf": [first, whole]}
        depth, _ = compiled_depth(whole, definitions)
    if depth > _MOST_LEVELS:
        raise RequestError(
            f"structured_outputs.json is nested too deeply ({depth} levels, {_MOST_LEVELS} are allowed), counted "
            "through its references"
        )
    return {**whole, "$defs": definitions} if definitions else whole
