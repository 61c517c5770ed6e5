"""Rewriting a JSON schema into the keywords that llguidance obeys exactly.

The result has only keywords of single types, `enum`, `anyOf`, `allOf` and `$ref` into `$defs`, with the meaning they
have in draft 2020-12, and `numbers.TERMINAL` for numbers that the library would change. What cannot be expressed in
these is dropped and listed by name, or is an error where the schema is strict.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from shoal.structured.schema import numbers
from shoal.structured.schema.arrays import array_keywords
from shoal.structured.schema.bounds import number_keywords
from shoal.structured.schema.conditions import CONDITIONS, combine_conditions
from shoal.structured.schema.disjoint import all_disjoint, exclusive_required_keys
from shoal.structured.schema.literals import Literals
from shoal.structured.schema.node import STRICT, TYPES, Location, Schema, all_of, any_of, malformed, read_types
from shoal.structured.schema.objects import object_keywords
from shoal.structured.schema.references import References, Target
from shoal.structured.schema.schema_error import schema_error
from shoal.structured.schema.strings import string_keywords

_MAX_NESTED = 12  # subschemas inside each other; a deeper one becomes a definition in $defs
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_KEYWORDS_OF_TYPES: dict[str, tuple[str, ...]] = {
    "number": _NUMBERS,
    "string": ("minLength", "maxLength", "pattern", "format"),
    "array": ("items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems", "contains",
              "minContains", "maxContains", "unevaluatedItems"),
    "object": ("properties", "patternProperties", "additionalProperties", "required", "minProperties",
               "maxProperties", "propertyNames", "unevaluatedProperties"),
}  # fmt: skip
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
_APPLICATORS = (*_REFERENCES, "allOf", "anyOf", "oneOf", *CONDITIONS)
_KNOWN = {
    "type", "nullable", "const", "enum", *_APPLICATORS,
    *(name for names in _KEYWORDS_OF_TYPES.values() for name in names),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _PendingSchema:
    """A subschema that becomes the definition `name`, and is not rewritten yet."""

    name: str
    target: Target
    here: Location


class Rewriter:
    """Rewrites one schema; `dropped` then has the keywords that were left out, each with its place.

    Args:
        strict: whether an unsupported keyword is an error.
    """

    def __init__(self, root: Schema, *, strict: bool) -> None:
        self.references = References(root) if isinstance(root, dict) else References({})
        self.dropped: dict[str, None] = {}
        self._root = root
        self._strict = strict
        self._resolved: dict[tuple[str, str, int], Target] = {}  # (keyword, reference, id() of the resource)
        self._definition_names: dict[tuple[int, bool], str] = {}  # by id() of the node, and `Location.joined`
        self._pending: deque[_PendingSchema] = deque()

    def run(self) -> tuple[Schema, dict[str, Schema]]:
        """Return the rewritten schema and the definitions that its references name."""
        root = self.rewrite(self._root, Location("#", self.references.root, strict=self._strict))
        found: dict[str, Schema] = {}
        while self._pending:
            each = self._pending.popleft()
            found[each.name] = self.rewrite(each.target.node, each.here)
        return root, found

    def drop_keyword(self, keyword: str, here: Location, why: str = "") -> None:
        """Leave out a keyword that is not supported, and note it. `why`: in which case it is not supported.

        Raises:
            RequestError: the subschema is strict.
        """
        if here.strict:
            raise schema_error(
                f"can't be obeyed: {keyword} at {here.pointer} is not supported"
                f"{f' ({why})' if why else ''}; remove it, or remove strict to have it ignored"
            )
        self.dropped[f"{keyword} at {here.pointer}"] = None

    def rewrite_child(self, node: Any, here: Location, *steps: str | int, joined: bool = False) -> Schema:
        """Rewrite `node`, to which `steps` lead from here. `joined`: it must be satisfied together with others."""
        under = here.under(*steps, joined=joined)
        if isinstance(node, dict) and under.level > _MAX_NESTED:
            target = Target(node, self.references.enter(node, here.resource), under.pointer)
            return self._reference_to(target, under)
        return self.rewrite(node, under)

    def resolve_reference(self, keyword: str, reference: Any, here: Location) -> Target:
        """Return the subschema that a reference finally leads to: subschemas with nothing but a reference are followed.

        Raises:
            RequestError: the reference leads to nothing, or the references form a circle.
        """
        asked = (keyword, reference, id(here.resource)) if isinstance(reference, str) else None
        if asked in self._resolved:
            return self._resolved[asked]
        seen: set[int] = set()
        while True:
            found = self.references.resolve(keyword, reference, here.resource, here.pointer)
            keywords = self.keywords(found.node) if isinstance(found.node, dict) else {}
            if len(keywords) != 1 or not (keywords.keys() & set(_REFERENCES)):
                if asked is not None:
                    self._resolved[asked] = found
                return found
            if id(found.node) in seen:
                raise schema_error(
                    "can't be obeyed: no text satisfies the schema, because what it requires "
                    f"refers to itself without end at {found.pointer}"
                )
            seen.add(id(found.node))
            ((keyword, reference),) = keywords.items()
            here = here.at(replace(found, resource=self.references.enter(found.node, found.resource)))

    def follow(self, node: Any, here: Location) -> tuple[Any, Location]:
        """Return a node and its location; if the node is nothing but a `$ref`, those that the reference leads to."""
        keywords = self.keywords(node) if isinstance(node, dict) else {}
        if len(keywords) == 1 and "$ref" in keywords:
            found = self.resolve_reference("$ref", keywords["$ref"], replace(here, resource=self._resource(node, here)))
            return found.node, here.at(found)
        return node, here

    def _resource(self, node: Any, here: Location) -> Any:
        return self.references.enter(node, here.resource)

    def _reference_to(self, target: Target, here: Location) -> Schema:
        if isinstance(target.node, bool):
            return target.node
        key = (id(target.node), here.joined)
        if key not in self._definition_names:
            self._definition_names[key] = str(len(self._definition_names))
            self._pending.append(_PendingSchema(self._definition_names[key], target, here.at(target)))
        return {"$ref": f"#/$defs/{self._definition_names[key]}"}

    def keywords(self, node: dict[str, Any]) -> dict[str, Any]:
        """Return the keywords of a schema that constrain values; annotations and unknown keywords do not."""
        if self.references.old and "$ref" in node:
            return {"$ref": node["$ref"]}
        return {
            name: value
            for name, value in node.items()
            if name in _KNOWN or (name == "discriminator" and "oneOf" in node)
        }

    def rewrite(self, node: Any, here: Location) -> Schema:
        """Return the rewritten form of the schema `node`."""
        if isinstance(node, bool):
            return node
        if not isinstance(node, dict):
            raise malformed("the schema", here, "be an object, true or false", node)
        here = replace(here, resource=self._resource(node, here), strict=here.strict or node.get(STRICT) is True)
        keywords = self.keywords(node)
        if not keywords:
            return True
        applied = [name for name in keywords if name in _APPLICATORS]
        alone = len(keywords.keys() - {"discriminator"}) == 1 and applied != ["allOf"]
        several = bool(applied) and not alone
        inside = replace(here, joined=here.joined or several)
        own, extra = self._rewrite_type_keywords(keywords, inside)
        parts = [part for name in applied for part in self._rewrite_applicator(name, keywords, inside)] + extra
        first = next((name for name in keywords if name in applied or name in ("properties", "required")), "")
        return all_of([*parts, own] if first in applied else [own, *parts])

    def _rewrite_type_keywords(self, keywords: dict[str, Any], here: Location) -> tuple[Schema, list[Schema]]:
        """Rewrite `type`, `enum`, `const` and the keywords of single types.

        Returns:
            The rewritten schema, and schemas that must be satisfied in addition.
        """
        types = read_types(keywords, here)
        wanted = TYPES if types is None else types
        extra: list[Schema] = []
        found: dict[str, Any] = {}
        impossible: set[str] = set()
        number: Schema = True
        for kind, names in _KEYWORDS_OF_TYPES.items():
            if not any(name in keywords for name in names):
                continue
            if kind == "number" and not {"number", "integer"} & set(wanted):
                continue
            if kind != "number" and kind not in wanted:
                continue
            if kind == "number":
                number = number_keywords(self, keywords, here, integer="number" not in wanted)
                if isinstance(number, dict) and numbers.TERMINAL not in number:
                    found |= number
            else:
                read: Callable[..., tuple[Schema, list[Schema]]] = _READERS[kind]
                made, beside = read(self, keywords, types, here)
                extra += beside
                if made is False:
                    impossible.add(kind)
                elif isinstance(made, dict):
                    found |= made
        listed = Literals.of(keywords, here)
        if listed is not None:
            return listed.to_schema(keywords, wanted, found, here), extra
        aside = number is False or (isinstance(number, dict) and numbers.TERMINAL in number)
        impossible |= {"number", "integer"} if aside else set()
        left = [kind for kind in wanted if kind not in impossible]
        if types is None and not impossible:
            return (found or True), extra
        plain: Schema = {"type": left[0] if len(left) == 1 else left, **found} if left else False
        return any_of([plain, number] if aside else [plain]), extra

    def _rewrite_applicator(self, name: str, keywords: dict[str, Any], here: Location) -> list[Schema]:
        """Rewrite a keyword that applies other schemas to the same value; all returned schemas must be satisfied."""
        value = keywords[name]
        if name in _REFERENCES:
            return [self._reference_to(self.resolve_reference(name, value, here), here)]
        if name in CONDITIONS:
            return CONDITIONS[name](self, keywords, here)
        if not isinstance(value, list) or (not value and name != "allOf"):
            raise malformed(name, here, "be a list of at least one schema", value)
        if name == "allOf":
            here = replace(here, around=(keywords, *here.around))
            cases, read = combine_conditions(self, value, here)
            return [*cases, *(self.rewrite_child(each, here, name, i) for i, each in enumerate(value) if i not in read)]
        if name == "oneOf":
            return [self._one_of(value, keywords.get("discriminator"), here)]
        return [any_of([self.rewrite_child(each, here, name, i) for i, each in enumerate(value)])]

    def _one_of(self, nodes: list[Any], discriminator: Any, here: Location) -> Schema:
        """Rewrite `oneOf` as `anyOf`, if no value satisfies two of the alternatives or they can be made exclusive.

        Otherwise `oneOf` is dropped, and an output may satisfy two of them.
        """
        exclusive = exclusive_required_keys(nodes)
        if exclusive:
            kind = {"type": "object"}  # a value of another type satisfies all of them, so `oneOf` forbids it
            absent = ({"properties": dict.fromkeys(others, False), "required": [key]} for key, others in exclusive)
            return any_of([{**kind, **each} for each in absent])
        if all_disjoint(self, nodes, here):
            return any_of([self.rewrite_child(each, here, "oneOf", i) for i, each in enumerate(nodes)])
        tag = discriminator.get("propertyName") if isinstance(discriminator, dict) else None
        if isinstance(tag, str) and all_disjoint(self, nodes, here, tag):  # OpenAPI requires the discriminator property
            has_tag: Schema = {"type": "object", "required": [tag]}
            made = [self.rewrite_child(each, here, "oneOf", i, joined=True) for i, each in enumerate(nodes)]
            return any_of([all_of([each, has_tag]) for each in made])
        self.drop_keyword("oneOf", here, "where a value may satisfy two of its schemas; use anyOf")
        return any_of([self.rewrite_child(each, here, "oneOf", i) for i, each in enumerate(nodes)])


_READERS: dict[str, Callable[..., tuple[Schema, list[Schema]]]] = {
    "string": string_keywords,
    "array": array_keywords,
    "object": object_keywords,
}
