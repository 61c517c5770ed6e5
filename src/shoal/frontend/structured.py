"""What an output must look like, from the user's words to a grammar that the engine obeys."""

import json
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote

from llguidance import LLMatcher

from shoal.engine.grammar import Grammars
from shoal.errors import RequestError
from shoal.types import StructuredOutputsParams
from shoal.wire import Ids

# JSON allows any amount of whitespace between two symbols, and a model may never come to an end of it. So much is
# enough for a line break and eight levels of four spaces.
_WHITESPACE = r"[ \t\n\r]{1,33}"
_MOST_REFERENCES = 1000  # of a schema that is searched for endless ones


def grammar_text(params: StructuredOutputsParams) -> str:
    """In llguidance's form, the same text for the same parameters. Whether it is a grammar that can be obeyed is found
    out by `GrammarChecker`.

    Raises:
        RequestError: a schema is not JSON or refers to itself without an end, there is nothing to choose from, or a
            text has no UTF-8 form.
    """
    if params.json is not None:
        text = _of_schema(_schema(params.json))
    elif params.json_object:
        text = _of_schema({"type": "object"})
    elif params.regex is not None:
        text = _guard(LLMatcher.grammar_from_regex, "regex", params.regex)
    elif params.choice is not None:
        if not params.choice:
            raise RequestError("structured_outputs.choice needs at least one text, got none")
        text = _guard(LLMatcher.grammar_from_regex, "choice", "|".join(map(_literal, params.choice)))
    else:
        text = _guard(LLMatcher.grammar_from_lark, "grammar", params.grammar or "")
    return text


class GrammarChecker:
    """Finds out before a request runs whether its grammar can be obeyed.

    Args:
        tokenizer_json: gives the text of the model's `tokenizer.json`; called when the first grammar comes.
        eos: the model's end-of-text tokens.
        vocab_size: the model's.
    """

    def __init__(self, tokenizer_json: Callable[[], str], eos: Ids, vocab_size: int) -> None:
        self._grammars = Grammars(tokenizer_json, eos, vocab_size)

    def check(self, grammar: str) -> None:
        """
        Raises:
            RequestError: it is no grammar, no text satisfies it, it uses what is not supported, or it is too large.
        """
        self._grammars.compile(grammar)


def _guard(make: Callable[[str], str], name: str, value: str) -> str:
    try:
        return make(value)
    except ValueError as error:
        # Half of a surrogate pair; or, of a schema, more levels than the library reads.
        what = "is nested too deep" if "recursion limit" in str(error) else "has no UTF-8 form"
        raise RequestError(f"structured_outputs.{name} {what}: {error}") from error


def _literal(text: str) -> str:
    """A regular expression of this text alone."""
    return "".join(char if char.isalnum() or char == " " else f"\\u{{{ord(char):x}}}" for char in text)


def _schema(given: str | Mapping[str, Any]) -> dict[str, Any]:
    """In plain JSON types."""
    try:
        text = given if isinstance(given, str) else json.dumps(given, default=_mapping, allow_nan=False)
        schema = json.loads(text, parse_constant=_no_constant)
    except (ValueError, TypeError, RecursionError) as error:
        raise RequestError(f"structured_outputs.json is not JSON: {' '.join(str(error).split())[:300]}") from error
    if schema is True:
        return {}
    if schema is False:
        raise RequestError("structured_outputs.json can't be obeyed: no text satisfies the schema false")
    if not isinstance(schema, dict):
        raise RequestError(f"structured_outputs.json must be a JSON schema, which is an object, got {text[:40]}")
    return schema


def _mapping(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a value of type {type(value).__name__} has no place in it")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _of_schema(schema: dict[str, Any]) -> str:
    try:
        ends = _ends(schema)
    except RecursionError as error:
        raise RequestError("structured_outputs.json is nested too deeply") from error
    if not ends:
        raise RequestError(
            "structured_outputs.json can't be obeyed: no text satisfies the schema, for what it requires refers to "
            "itself without an end"
        )

    def make(text: str) -> str:
        return LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": _WHITESPACE})

    return _guard(make, "json", json.dumps(schema))


def _ends(root: dict[str, Any]) -> bool:
    """Whether some finite value may satisfy the schema, as far as its references are concerned.

    The least fixed point: a reference has a finite value if one can be built from references that are known to.
    """
    finite: set[str] = set()

    def has_value(schema: Any) -> bool:
        if not isinstance(schema, dict) or "const" in schema or "enum" in schema:
            return True
        if isinstance(schema.get("$ref"), str) and schema["$ref"] not in finite:
            return False
        one_of = [_items(schema.get(name)) for name in ("anyOf", "oneOf")]
        if not all(any(map(has_value, parts)) for parts in one_of if parts):
            return False
        return all(map(has_value, _items(schema.get("allOf")) + _required(schema)))

    unknown = {reference: _resolve(root, reference) for reference in _references(root)}
    if len(unknown) > _MOST_REFERENCES:
        return True
    while found := {reference for reference, schema in unknown.items() if has_value(schema)}:
        finite |= found
        unknown = {reference: schema for reference, schema in unknown.items() if reference not in found}
    return has_value(root)


def _required(schema: dict[str, Any]) -> list[Any]:
    """The schemas of what every value contains."""
    if schema.get("type") == "object":
        properties = schema.get("properties")
        known = properties if isinstance(properties, dict) else {}
        return [known[name] for name in _items(schema.get("required")) if isinstance(name, str) and name in known]
    if schema.get("type") == "array":
        least = schema.get("minItems", 0)
        count = int(least) if isinstance(least, int | float) else 0
        first = _items(schema.get("prefixItems"))
        return first[:count] + ([schema.get("items")] if count > len(first) else [])
    return []


def _items(value: Any) -> list[Any]:
    """Of a part that should be a list; where it isn't, llguidance says so."""
    return value if isinstance(value, list) else []


def _references(schema: Any) -> set[str]:
    """All that a schema refers to, at any depth."""
    found: set[str] = set()
    pending = [schema]
    while pending:
        part = pending.pop()
        if isinstance(part, dict):
            if isinstance(part.get("$ref"), str):
                found.add(part["$ref"])
            pending.extend(part.values())
        elif isinstance(part, list):
            pending.extend(part)
    return found


def _resolve(root: dict[str, Any], reference: str) -> Any:
    """The schema at a JSON pointer into `root`; None where it is none, or leads nowhere."""
    if not reference.startswith("#"):
        return None
    at: Any = root
    for name in reference.removeprefix("#").split("/")[1:]:
        key = unquote(name).replace("~1", "/").replace("~0", "~")
        if isinstance(at, dict):
            at = at.get(key)
        elif isinstance(at, list) and key.isdigit() and int(key) < len(at):
            at = at[int(key)]
        else:
            return None
    return at
