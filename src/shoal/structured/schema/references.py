"""Resolving the references of a JSON schema: `$ref`, `$anchor`, `$id`, `$dynamicRef` and `$recursiveRef`.

The rules are those of JSON Schema 2020-12, "The JSON Schema Core Vocabulary", and of RFC 6901 for JSON pointers.
Drafts 4 to 7 write an identifier as `id` and an anchor as `$id: "#name"`; both forms are read.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin

from shoal.structured.schema.schema_error import schema_error

_OLD_DRAFTS = ("draft-03", "draft-04", "draft-05", "draft-06", "draft-07")
# Keywords whose value is one subschema, a list of subschemas, or an object of subschemas by name.
_ONE = ("additionalProperties", "additionalItems", "unevaluatedItems", "unevaluatedProperties", "contains",
        "propertyNames", "not", "if", "then", "else", "items", "contentSchema")  # fmt: skip
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_MAPS = ("properties", "patternProperties", "dependentSchemas", "dependencies", "$defs", "definitions")


@dataclass(eq=False, slots=True)
class Resource:
    """A schema resource: a part of the schema with an `$id` of its own. References inside it are relative to it.

    `pointer` is the JSON pointer to `root` in the whole schema. `anchors` maps each anchor name to its subschema and
    that subschema's pointer; `dynamic` has the names of the dynamic anchors; `recursive` is true if the root has
    `$recursiveAnchor: true`.
    """

    uri: str
    root: Any
    pointer: str
    anchors: dict[str, tuple[Any, str]] = field(default_factory=dict)
    dynamic: set[str] = field(default_factory=set)
    recursive: bool = False


@dataclass(frozen=True, slots=True)
class Target:
    """The subschema that a reference leads to, the resource it belongs to, and its JSON pointer."""

    node: Any
    resource: Resource
    pointer: str


class References:
    """An index of the identifiers and anchors of one schema, which resolves references."""

    def __init__(self, root: dict[str, Any]) -> None:
        self.old = any(draft in str(root.get("$schema")) for draft in _OLD_DRAFTS)
        self.before_2020 = self.old or "2019-09" in str(root.get("$schema"))
        self._inner: dict[int, Resource] = {}  # resources by the id() of their root
        self.root = Resource(_identifier(root) or "", root, "#")
        self._by_uri = {self.root.uri: self.root}
        self._inner[id(root)] = self.root
        self._index()

    def _index(self) -> None:
        pending: list[tuple[Any, Resource, str]] = [(self.root.root, self.root, "#")]
        while pending:
            node, resource, here = pending.pop()
            if not isinstance(node, dict):
                continue
            if node is not resource.root and (name := _identifier(node)) and not (self.old and "$ref" in node):
                resource = Resource(urldefrag(_joined(resource.uri, name))[0], node, here)
                self._by_uri.setdefault(resource.uri, resource)
                self._inner[id(node)] = resource
            _note_anchors(node, resource, here)
            pending.extend((child, resource, f"{here}/{step}") for step, child in _children(node))

    def enter(self, node: Any, resource: Resource) -> Resource:
        """Return the resource that `node` begins, or else `resource`, which is the one around it."""
        return self._inner.get(id(node), resource)

    def resolve(self, keyword: str, reference: Any, resource: Resource, here: str) -> Target:
        """Return the subschema that a reference leads to.

        Args:
            keyword: the keyword of the reference, such as `$ref`.
            resource: the resource around the reference.
            here: a JSON pointer to the subschema with the reference, for error messages.

        Raises:
            RequestError: the value is not a reference, it points outside the schema or to nothing, or its target
                depends on the path by which the schema was entered (`$dynamicRef`, `$recursiveRef`).
        """
        if not isinstance(reference, str):
            raise schema_error(f": {keyword} at {here} must be a string")
        if keyword == "$recursiveRef":
            self._check_only_one(keyword, here, sum(each.recursive for each in self._by_uri.values()))
        uri, fragment = ("", reference[1:]) if reference.startswith("#") else urldefrag(reference)
        if uri:
            full = urldefrag(_joined(resource.uri, uri))[0]
            found = self._by_uri.get(full)
            if found is None:
                raise schema_error(
                    f": {reference} at {here} is not in the schema, and nothing is fetched: add it to $defs"
                )
            resource = found
        fragment = unquote(fragment)
        if fragment and not fragment.startswith("/"):
            if keyword == "$dynamicRef" and fragment in resource.dynamic:
                self._check_only_one(keyword, here, sum(fragment in each.dynamic for each in self._by_uri.values()))
            if fragment not in resource.anchors:
                raise schema_error(f": {reference} at {here} names an $anchor that does not exist")
            node, at = resource.anchors[fragment]
            return Target(node, self.enter(node, resource), at)
        return self._follow_pointer(fragment, resource, reference, here)

    def _follow_pointer(self, pointer: str, resource: Resource, reference: str, here: str) -> Target:
        node: Any = resource.root
        for step in pointer.split("/")[1:]:
            key = step.replace("~1", "/").replace("~0", "~")
            if isinstance(node, dict) and key in node:
                node = node[key]
            elif isinstance(node, list) and _is_index(key) and int(key) < len(node):
                node = node[int(key)]
            else:
                raise schema_error(f": {reference} at {here} points to nothing in the schema")
            resource = self.enter(node, resource)
        if not isinstance(node, dict | bool):
            raise schema_error(f": {reference} at {here} points to something that is no schema")
        return Target(node, resource, (self.root.pointer if pointer else resource.pointer) + pointer)

    def _check_only_one(self, keyword: str, here: str, count: int) -> None:
        if count > 1:
            raise schema_error(
                f": {keyword} at {here} can't be obeyed: {count} parts with an $id have its "
                "anchor, and which of them is meant depends on the path that leads there; use $ref"
            )


def pointer_step(name: str) -> str:
    """Return a name escaped as one step of a JSON pointer."""
    return name.replace("~", "~0").replace("/", "~1")


def _is_index(key: str) -> bool:
    return key.isascii() and key.isdigit() and len(key) < 10 and (key == "0" or not key.startswith("0"))


def _identifier(node: Mapping[str, Any]) -> str | None:
    for name in ("$id", "id"):
        found = node.get(name)
        if isinstance(found, str) and found and not found.startswith("#"):
            return found
    return None


def _joined(base: str, uri: str) -> str:
    """Return `uri` resolved against `base`. In schemes that have no paths, such as urn, `uri` is returned as it is."""
    return urljoin(base, uri)


def _note_anchors(node: Mapping[str, Any], resource: Resource, here: str) -> None:
    names = [node.get("$anchor"), node.get("$dynamicAnchor")]
    names += [str(node[key])[1:] for key in ("$id", "id") if str(node.get(key)).startswith("#")]
    for name in names:
        if isinstance(name, str):
            resource.anchors.setdefault(name, (node, here))
    if isinstance(node.get("$dynamicAnchor"), str):
        resource.dynamic.add(node["$dynamicAnchor"])
    resource.recursive = resource.recursive or (node is resource.root and node.get("$recursiveAnchor") is True)


def _children(node: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the subschemas directly inside `node`, each with the JSON pointer to it from `node`."""
    for name in _ONE:
        if isinstance(node.get(name), dict):
            yield name, node[name]
    for name in _LISTS:
        if isinstance(node.get(name), list):
            yield from ((f"{name}/{i}", child) for i, child in enumerate(node[name]))
    for name in _MAPS:
        if isinstance(node.get(name), dict):
            yield from ((f"{name}/{pointer_step(key)}", child) for key, child in node[name].items())
