"""Keywords of strings: lengths, patterns and formats."""

from typing import Any

from shoal.errors import RequestError
from shoal.structured.schema.node import Here, Rewrites, Schema, integer_of, malformed
from shoal.structured.schema.patterns import NotRegular, translated

_LEAP = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"
_DATE = (
    "(?:[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP}-02-29)"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]+)?(?:[zZ]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
# Formats that the library knows, and those that a pattern says.
_OBEYED = {"duration", "hostname", "ipv4", "ipv6", "uri"}
_ATOM = r"[A-Za-z0-9!#$%&'*+\/=?^_`{|}~-]"
# The part before the @ has 64 characters at most (RFC 5321), so the more dots, the shorter what is between them.
_MAILBOX = "|".join(
    rf"{_ATOM}{{1,{most}}}(?:\.{_ATOM}{{1,{most}}}){{{dots}}}" for dots, most in enumerate((64, 31, 20, 15))
)
_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HEX = "[0-9a-fA-F]"
_BASE64 = r"(?:[A-Za-z0-9+\/]{4})*(?:[A-Za-z0-9+\/]{2}==|[A-Za-z0-9+\/]{3}=)?"
_PATTERNS = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}[tT]{_TIME}$",
    "email": rf"^(?:{_MAILBOX})@{_LABEL}(?:\.{_LABEL}){{0,3}}$",
    "byte": f"^{_BASE64}$",
    "base64": f"^{_BASE64}$",
    "json-pointer": r"^(?:\/(?:[^~\/]|~[01])*)*$",
    "relative-json-pointer": r"^(?:0|[1-9][0-9]*)(?:#|(?:\/(?:[^~\/]|~[01])*)*)$",
    "uuid": f"^{_HEX}{{8}}-(?:{_HEX}{{4}}-){{3}}{_HEX}{{12}}$",
    **{
        f"uuid{version}": f"^{_HEX}{{8}}-{_HEX}{{4}}-{version}{_HEX}{{3}}-[89abAB]{_HEX}{{3}}-{_HEX}{{12}}$"
        for version in range(1, 9)
    },
}
_KNOWN = {"date", "time", "date-time", "email", "uuid"}  # to the library, a little less exactly
# They say how a value is shown or stored, of which any text will do.
_HINTS = {
    "password", "binary", "text", "textarea", "multiline", "string", "char", "markdown", "html", "color-picker", "path",
    "unknown", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float", "double", "decimal",
}  # fmt: skip
_MOST_LENGTH = 1 << 20  # characters; the library counts in a regular expression


def string_keywords(
    rewriter: Rewrites, words: dict[str, Any], types: list[str] | None, here: Here
) -> tuple[Schema, list[Schema]]:
    """The keywords of strings, and what holds beside them. False: no string satisfies them."""
    found: dict[str, Any] = {}
    least, most = integer_of(words, "minLength", here), integer_of(words, "maxLength", here)
    if least is not None and most is not None and least > most:
        return False, []
    if least:
        found["minLength"] = least
    if most is not None and most <= _MOST_LENGTH:  # no output is longer
        found["maxLength"] = most
    extra: list[Schema] = []
    if "pattern" in words and (pattern := pattern_of(rewriter, words["pattern"], "pattern", here)):
        found["pattern"] = pattern
    if "format" in words:
        made = _format(rewriter, words["format"], here)
        if "pattern" not in made or "pattern" not in found:
            found |= made
        elif words["format"] in _KNOWN:  # whether both leave anything is found out with the library's shorter pattern
            found["format"] = words["format"]
        else:
            extra.append({"type": types, **made} if types else made)
    return (found or True), extra


def pattern_of(rewriter: Rewrites, pattern: Any, name: str, here: Here) -> str | None:
    """A pattern in the library's words; None where the schema goes without it."""
    if not isinstance(pattern, str):
        raise malformed(name, here, "be a text", pattern)
    try:
        return translated(pattern)
    except NotRegular as why:
        rewriter.skip(name, here, str(why))
        return None
    except ValueError as error:
        raise RequestError(
            f"structured_outputs.json: {name} at {here.place} is no regular expression: {error}"
        ) from None


def format_keywords(name: str) -> dict[str, Any] | None:
    """The keywords that say a format; None where it is none that can be obeyed."""
    if name in _OBEYED:
        return {"format": name}
    if name in _PATTERNS:
        return {"pattern": translated(_PATTERNS[name])}
    return {} if name in _HINTS else None


def _format(rewriter: Rewrites, name: Any, here: Here) -> dict[str, Any]:
    if not isinstance(name, str):
        raise malformed("format", here, "be a text", name)
    found = format_keywords(name)
    if found is None:
        rewriter.skip(f"format {name[:40]}", here)
    return found or {}
