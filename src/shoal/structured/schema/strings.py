"""Rewriting the keywords of strings: lengths, patterns and formats."""

from typing import Any

from shoal.structured.schema.node import Location, Schema, SchemaRewriter, malformed, read_count
from shoal.structured.schema.patterns import PatternNotSupported, translate
from shoal.structured.schema.schema_error import schema_error

_LEAP = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"
_DATE = (
    "(?:[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP}-02-29)"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]+)?(?:[zZ]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_OBEYED = {"duration", "hostname", "ipv4", "ipv6", "uri"}  # formats that the library obeys exactly
_ATOM = r"[A-Za-z0-9!#$%&'*+\/=?^_`{|}~-]"
# The part before the @ has at most 64 characters (RFC 5321), so the more dots it has, the shorter its parts must be.
_MAILBOX = "|".join(
    rf"{_ATOM}{{1,{most}}}(?:\.{_ATOM}{{1,{most}}}){{{dots}}}" for dots, most in enumerate((64, 31, 20, 15))
)
_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HEX = "[0-9a-fA-F]"
_BASE64 = r"(?:[A-Za-z0-9+\/]{4})*(?:[A-Za-z0-9+\/]{2}==|[A-Za-z0-9+\/]{3}=)?"
_PATTERNS = {  # formats that we write as a pattern
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
_KNOWN = {"date", "time", "date-time", "email", "uuid"}  # formats that the library obeys, but less exactly
# Formats that say how a value is displayed or stored; any text satisfies them.
_HINTS = {
    "password", "binary", "text", "textarea", "multiline", "string", "char", "markdown", "html", "color-picker", "path",
    "unknown", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float", "double", "decimal",
}  # fmt: skip
_MAX_LENGTH = 1 << 20  # characters; the library writes lengths into a regular expression


def string_keywords(
    rewriter: SchemaRewriter, keywords: dict[str, Any], types: list[str] | None, here: Location
) -> tuple[Schema, list[Schema]]:
    """Return the rewritten keywords of strings, and schemas that must be satisfied in addition.

    The first is False if no string satisfies the keywords.
    """
    found: dict[str, Any] = {}
    least, most = read_count(keywords, "minLength", here), read_count(keywords, "maxLength", here)
    if least is not None and most is not None and least > most:
        return False, []
    if least:
        found["minLength"] = least
    if most is not None and most <= _MAX_LENGTH:  # no output is longer
        found["maxLength"] = most
    extra: list[Schema] = []
    if "pattern" in keywords and (pattern := read_pattern(rewriter, keywords["pattern"], "pattern", here)):
        found["pattern"] = pattern
    if "format" in keywords:
        made = _format(rewriter, keywords["format"], here)
        if "pattern" not in made or "pattern" not in found:
            found |= made
        elif (
            keywords["format"] in _KNOWN
        ):  # whether both leave anything is found out with the library's shorter pattern
            found["format"] = keywords["format"]
        else:
            extra.append({"type": types, **made} if types else made)
    return (found or True), extra


def read_pattern(rewriter: SchemaRewriter, pattern: Any, name: str, here: Location) -> str | None:
    """Return a pattern in the syntax of the library, or None if it is not supported and was dropped."""
    if not isinstance(pattern, str):
        raise malformed(name, here, "be a text", pattern)
    try:
        return translate(pattern)
    except PatternNotSupported as why:
        rewriter.drop_keyword(name, here, str(why))
        return None
    except ValueError as error:
        raise schema_error(f": {name} at {here.pointer} is not a regular expression: {error}") from None


def read_format(name: str) -> dict[str, Any] | None:
    """Return the keywords that express a format, or None if the format is not supported."""
    if name in _OBEYED:
        return {"format": name}
    if name in _PATTERNS:
        return {"pattern": translate(_PATTERNS[name])}
    return {} if name in _HINTS else None


def _format(rewriter: SchemaRewriter, name: Any, here: Location) -> dict[str, Any]:
    if not isinstance(name, str):
        raise malformed("format", here, "be a text", name)
    found = read_format(name)
    if found is None:
        rewriter.drop_keyword(f"format {name[:40]}", here)
    return found or {}
