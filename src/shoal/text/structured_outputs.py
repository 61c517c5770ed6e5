"""Turning the structured outputs that a user asks for into a grammar that the engine obeys."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llguidance import LLMatcher

from shoal.errors import structured_outputs_error
from shoal.params import StructuredOutputsParams
from shoal.structured.schema.grammar_json import grammar_json
from shoal.structured.schema.prepare import prepare

# JSON allows any amount of whitespace between two symbols, which a model may go on writing forever. This much is enough
# for a line break and eight levels of four spaces.
_WHITESPACE = r"[ \t\n\r]{1,33}"


@dataclass(frozen=True, slots=True)
class PreparedGrammar:
    """A grammar in llguidance's form."""

    text: str
    ignored: tuple[str, ...] = ()  # unsupported keywords of a schema that were left out, each with its place


def grammar_text(params: StructuredOutputsParams) -> PreparedGrammar:
    """Return the grammar for structured outputs; equal parameters give equal texts.

    The grammar may still be invalid, which `GrammarChecker` finds out.

    Raises:
        RequestError: a schema can't be obeyed (see `structured.schema.prepare`), a choice is empty, or a text has no
            UTF-8 form.
    """
    if params.json is not None:
        return _of_schema(params.json, strict=params.strict)
    if params.json_object:
        return _of_schema({"type": "object"}, strict=False)
    if params.regex is not None:
        text = _made(LLMatcher.grammar_from_regex, "regex", params.regex)
    elif params.choice is not None:
        if not params.choice:
            raise structured_outputs_error("needs at least one text, got none", "choice")
        text = _made(LLMatcher.grammar_from_regex, "choice", "|".join(map(_literal, params.choice)))
    else:
        text = _made(LLMatcher.grammar_from_lark, "grammar", params.grammar or "")
    return PreparedGrammar(text)


def _made(make: Callable[[str], str], kind: str, value: str) -> str:
    """Return the grammar that the library makes of a value.

    Raises:
        RequestError: the value has half of a surrogate pair, which a message can't carry.
    """
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise structured_outputs_error(f"has no UTF-8 form: {error}", kind) from error
    return make(value)


def _literal(text: str) -> str:
    """Return a regular expression that matches exactly this text."""
    return "".join(char if char.isalnum() or char == " " else f"\\u{{{ord(char):x}}}" for char in text)


def _of_schema(schema: str | Mapping[str, Any], *, strict: bool) -> PreparedGrammar:
    prepared = prepare(schema, strict=strict)
    return PreparedGrammar(grammar_json(prepared.schema, _WHITESPACE), prepared.dropped)
