"""A JSON schema in the keywords that llguidance obeys exactly; what can't be said in them is left out, by name.

What comes out has the types' own keywords, `enum`, `anyOf`, `allOf` and `$ref` into `$defs` only, in the meaning of
draft 2020-12, and `numbers.TERMINAL` for numbers that the library would change.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from shoal.errors import RequestError
from shoal.structured.schema import numbers
from shoal.structured.schema.arrays import array_keywords
from shoal.structured.schema.bounds import number_keywords
from shoal.structured.schema.conditions import CONDITIONS, conditions_together
from shoal.structured.schema.disjoint import disjoint, exclusive_keys
from shoal.structured.schema.literals import Literals
from shoal.structured.schema.node import STRICT, TYPES, Here, Schema, all_of, any_of, malformed, types_of
from shoal.structured.schema.objects import object_keywords
from shoal.structured.schema.references import References, Target
from shoal.structured.schema.strings import string_keywords

_NESTED = 12  # subschemas inside of each other; what is deeper goes into $defs
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_GROUPS: dict[str, tuple[str, ...]] = {
    "number": _NUMBERS,
    "string": ("minLength", "maxLength", "pattern", "format"),
    "array": ("items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems", "contains",
              "minContains", "maxContains", "unevaluatedItems"),
    "object": ("properties", "patternProperties", "additionalProperties", "required", "minProperties",
               "maxProperties", "propertyNames", "unevaluatedProperties"),
}  # fmt: skip
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
_APPLICATORS = (*_REFERENCES, "allOf", "anyOf", "oneOf", *CONDITIONS)
_KNOWN = {"type", "nullable", "const", "enum", *_APPLICATORS, *(name for names in _GROUPS.values() for name in names)}


@dataclass(frozen=True, slots=True)
class _PendingSchema:
    name: str
    target: Target
    here: Here


class Rewriter:
    """
    Args:
        strict: what can't be obeyed is an error.
    """

    def __init__(self, root: Schema, *, strict: bool) -> None:
        self.references = References(root) if isinstance(root, dict) else References({})
        self.dropped: dict[str, None] = {}
        self._root = root
        self._strict = strict
        self._found: dict[tuple[str, str, int], Target] = {}
        self._names: dict[tuple[int, bool], str] = {}
        self._pending: deque[_PendingSchema] = deque()

    def run(self) -> tuple[Schema, dict[str, Schema]]:
        """The schema, and what its references lead to."""
        root = self.schema(self._root, Here("#", self.references.root, strict=self._strict))
        found: dict[str, Schema] = {}
        while self._pending:
            each = self._pending.popleft()
            found[each.name] = self.schema(each.target.node, each.here)
        return root, found

    def skip(self, keyword: str, here: Here, why: str = "") -> None:
        """Go without a keyword.

        Raises:
            RequestError: the client wants it obeyed or refused.
        """
        if here.strict:
            raise RequestError(
                f"structured_outputs.json can't be obeyed: {keyword} at {here.place} is not supported"
                f"{f' ({why})' if why else ''}; leave it out, or go without it by leaving out strict"
            )
        self.dropped[f"{keyword} at {here.place}"] = None

    def child(self, node: Any, here: Here, *steps: str | int, joined: bool = False) -> Schema:
        """What a subschema is rewritten to. `joined`: it is one of several that hold together."""
        under = here.under(*steps, joined=joined)
        if isinstance(node, dict) and under.level > _NESTED:
            target = Target(node, self.references.enter(node, here.resource), under.place)
            return self._reference(target, under)
        return self.schema(node, under)

    def target(self, keyword: str, reference: Any, here: Here) -> Target:
        """Where a reference leads, behind all that are nothing but references themselves.

        Raises:
            RequestError: it leads to nothing, or round in a circle.
        """
        asked = (keyword, reference, id(here.resource)) if isinstance(reference, str) else None
        if asked in self._found:
            return self._found[asked]
        seen: set[int] = set()
        while True:
            found = self.references.resolve(keyword, reference, here.resource, here.place)
            words = self.words(found.node) if isinstance(found.node, dict) else {}
            if len(words) != 1 or not (words.keys() & set(_REFERENCES)):
                if asked is not None:
                    self._found[asked] = found
                return found
            if id(found.node) in seen:
                raise RequestError(
                    "structured_outputs.json can't be obeyed: no text satisfies the schema, for what it requires "
                    f"refers to itself without an end at {found.place}"
                )
            seen.add(id(found.node))
            ((keyword, reference),) = words.items()
            here = here.at(replace(found, resource=self.references.enter(found.node, found.resource)))

    def followed(self, node: Any, here: Here) -> tuple[Any, Here]:
        """A subschema as it is found behind its reference, if it is nothing but one."""
        words = self.words(node) if isinstance(node, dict) else {}
        if len(words) == 1 and "$ref" in words:
            found = self.target("$ref", words["$ref"], replace(here, resource=self._resource(node, here)))
            return found.node, here.at(found)
        return node, here

    def _resource(self, node: Any, here: Here) -> Any:
        return self.references.enter(node, here.resource)

    def _reference(self, target: Target, here: Here) -> Schema:
        if isinstance(target.node, bool):
            return target.node
        key = (id(target.node), here.joined)
        if key not in self._names:
            self._names[key] = str(len(self._names))
            self._pending.append(_PendingSchema(self._names[key], target, here.at(target)))
        return {"$ref": f"#/$defs/{self._names[key]}"}

    def words(self, node: dict[str, Any]) -> dict[str, Any]:
        """The keywords that bind values; the others are annotations or unknown, which comes to the same."""
        if self.references.old and "$ref" in node:
            return {"$ref": node["$ref"]}
        return {
            name: value
            for name, value in node.items()
            if name in _KNOWN or (name == "discriminator" and "oneOf" in node)
        }

    def schema(self, node: Any, here: Here) -> Schema:
        """What a schema is rewritten to."""
        if isinstance(node, bool):
            return node
        if not isinstance(node, dict):
            raise malformed("the schema", here, "be an object or a truth value", node)
        here = replace(here, resource=self._resource(node, here), strict=here.strict or node.get(STRICT) is True)
        words = self.words(node)
        if not words:
            return True
        applied = [name for name in words if name in _APPLICATORS]
        alone = len(words.keys() - {"discriminator"}) == 1 and applied != ["allOf"]
        several = bool(applied) and not alone
        inside = replace(here, joined=here.joined or several)
        own, extra = self._own(words, inside)
        parts = [part for name in applied for part in self._applied(name, words, inside)] + extra
        first = next((name for name in words if name in applied or name in ("properties", "required")), "")
        return all_of([*parts, own] if first in applied else [own, *parts])

    def _own(self, words: dict[str, Any], here: Here) -> tuple[Schema, list[Schema]]:
        """What the keywords of the types, `enum` and `const` come to, and what has to hold beside it."""
        types = types_of(words, here)
        wanted = TYPES if types is None else types
        extra: list[Schema] = []
        found: dict[str, Any] = {}
        impossible: set[str] = set()
        number: Schema = True
        for kind, names in _GROUPS.items():
            if not any(name in words for name in names):
                continue
            if kind == "number" and not {"number", "integer"} & set(wanted):
                continue
            if kind != "number" and kind not in wanted:
                continue
            if kind == "number":
                number = number_keywords(self, words, here, integer="number" not in wanted)
                if isinstance(number, dict) and numbers.TERMINAL not in number:
                    found |= number
            else:
                read: Callable[..., tuple[Schema, list[Schema]]] = _READERS[kind]
                made, beside = read(self, words, types, here)
                extra += beside
                if made is False:
                    impossible.add(kind)
                elif isinstance(made, dict):
                    found |= made
        listed = Literals.of(words, here)
        if listed is not None:
            return listed.schema(words, wanted, found, here), extra
        aside = number is False or (isinstance(number, dict) and numbers.TERMINAL in number)
        impossible |= {"number", "integer"} if aside else set()
        left = [kind for kind in wanted if kind not in impossible]
        if types is None and not impossible:
            return (found or True), extra
        plain: Schema = {"type": left[0] if len(left) == 1 else left, **found} if left else False
        return any_of([plain, number] if aside else [plain]), extra

    def _applied(self, name: str, words: dict[str, Any], here: Here) -> list[Schema]:
        """What one keyword that applies other schemas in the same place comes to: all of these hold."""
        value = words[name]
        if name in _REFERENCES:
            return [self._reference(self.target(name, value, here), here)]
        if name in CONDITIONS:
            return CONDITIONS[name](self, words, here)
        if not isinstance(value, list) or (not value and name != "allOf"):
            raise malformed(name, here, "be a list of at least one schema", value)
        if name == "allOf":
            here = replace(here, around=(words, *here.around))
            cases, read = conditions_together(self, value, here)
            return [*cases, *(self.child(each, here, name, i) for i, each in enumerate(value) if i not in read)]
        if name == "oneOf":
            return [self._one_of(value, words.get("discriminator"), here)]
        return [any_of([self.child(each, here, name, i) for i, each in enumerate(value)])]

    def _one_of(self, nodes: list[Any], discriminator: Any, here: Here) -> Schema:
        """Alternatives of which no value satisfies two, as far as that can be seen or brought about."""
        exclusive = exclusive_keys(nodes)
        if exclusive:
            kind = {"type": "object"}  # whatever is none satisfies all of them
            absent = ({"properties": dict.fromkeys(others, False), "required": [key]} for key, others in exclusive)
            return any_of([{**kind, **each} for each in absent])
        if disjoint(self, nodes, here):
            return any_of([self.child(each, here, "oneOf", i) for i, each in enumerate(nodes)])
        tag = discriminator.get("propertyName") if isinstance(discriminator, dict) else None
        if isinstance(tag, str) and disjoint(self, nodes, here, tag):  # as OpenAPI has it, the tag has to be there
            there: Schema = {"type": "object", "required": [tag]}
            made = [self.child(each, here, "oneOf", i, joined=True) for i, each in enumerate(nodes)]
            return any_of([all_of([each, there]) for each in made])
        self.skip("oneOf", here, "where a value may satisfy two of its schemas; use anyOf")
        return any_of([self.child(each, here, "oneOf", i) for i, each in enumerate(nodes)])


_READERS: dict[str, Callable[..., tuple[Schema, list[Schema]]]] = {
    "string": string_keywords,
    "array": array_keywords,
    "object": object_keywords,
}
