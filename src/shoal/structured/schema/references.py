"""Where the references of a JSON schema lead: `$ref`, `$anchor`, `$id`, `$dynamicRef`, `$recursiveRef`.

The rules are those of JSON Schema 2020-12, "The JSON Schema Core Vocabulary", and of RFC 6901 for pointers; drafts 4 to
7 write an identifier as `id` and an anchor as `$id: "#name"`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin

from shoal.errors import RequestError

_OLD_DRAFTS = ("draft-03", "draft-04", "draft-05", "draft-06", "draft-07")
_ONE = ("additionalProperties", "additionalItems", "unevaluatedItems", "unevaluatedProperties", "contains",
        "propertyNames", "not", "if", "then", "else", "items", "contentSchema")  # fmt: skip
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_MAPS = ("properties", "patternProperties", "dependentSchemas", "dependencies", "$defs", "definitions")


@dataclass(eq=False, slots=True)
class Resource:
    """A part of the schema with an identifier of its own, from which its references are looked up."""

    uri: str
    root: Any
    place: str
    anchors: dict[str, tuple[Any, str]] = field(default_factory=dict)
    dynamic: set[str] = field(default_factory=set)
    recursive: bool = False


@dataclass(frozen=True, slots=True)
class Target:
    """A subschema that something refers to."""

    node: Any
    resource: Resource
    place: str


class References:
    """An index of one schema's identifiers and anchors."""

    def __init__(self, root: dict[str, Any]) -> None:
        self.old = any(draft in str(root.get("$schema")) for draft in _OLD_DRAFTS)
        self.before_2020 = self.old or "2019-09" in str(root.get("$schema"))
        self._inner: dict[int, Resource] = {}  # by the id() of its root
        self.root = Resource(_identifier(root) or "", root, "#")
        self._by_uri = {self.root.uri: self.root}
        self._inner[id(root)] = self.root
        self._index()

    def _index(self) -> None:
        pending: list[tuple[Any, Resource, str]] = [(self.root.root, self.root, "#")]
        while pending:
            node, resource, place = pending.pop()
            if not isinstance(node, dict):
                continue
            if node is not resource.root and (name := _identifier(node)) and not (self.old and "$ref" in node):
                resource = Resource(urldefrag(_joined(resource.uri, name))[0], node, place)
                self._by_uri.setdefault(resource.uri, resource)
                self._inner[id(node)] = resource
            _note_anchors(node, resource, place)
            pending.extend((child, resource, f"{place}/{step}") for step, child in _children(node))

    def enter(self, node: Any, resource: Resource) -> Resource:
        """The resource that the references inside of `node` are looked up from."""
        return self._inner.get(id(node), resource)

    def resolve(self, keyword: str, reference: Any, resource: Resource, place: str) -> Target:
        """
        Raises:
            RequestError: it is no reference, leads out of the schema or to nothing, or depends on who refers to it.
        """
        if not isinstance(reference, str):
            raise RequestError(f"structured_outputs.json: {keyword} at {place} must be a text")
        if keyword == "$recursiveRef":
            self._check_alone(keyword, place, sum(each.recursive for each in self._by_uri.values()))
        uri, fragment = ("", reference[1:]) if reference.startswith("#") else urldefrag(reference)
        if uri:
            full = urldefrag(_joined(resource.uri, uri))[0]
            found = self._by_uri.get(full)
            if found is None:
                raise RequestError(
                    f"structured_outputs.json: {reference} at {place} is not in the schema, and nothing is fetched: "
                    "put it into $defs"
                )
            resource = found
        fragment = unquote(fragment)
        if fragment and not fragment.startswith("/"):
            if keyword == "$dynamicRef" and fragment in resource.dynamic:
                self._check_alone(keyword, place, sum(fragment in each.dynamic for each in self._by_uri.values()))
            if fragment not in resource.anchors:
                raise RequestError(f"structured_outputs.json: there is no $anchor {reference}, asked for at {place}")
            node, at = resource.anchors[fragment]
            return Target(node, self.enter(node, resource), at)
        return self._at(fragment, resource, reference, place)

    def _at(self, pointer: str, resource: Resource, reference: str, place: str) -> Target:
        node: Any = resource.root
        for step in pointer.split("/")[1:]:
            key = step.replace("~1", "/").replace("~0", "~")
            if isinstance(node, dict) and key in node:
                node = node[key]
            elif isinstance(node, list) and _is_index(key) and int(key) < len(node):
                node = node[int(key)]
            else:
                raise RequestError(f"structured_outputs.json: {reference} at {place} leads to nothing in the schema")
            resource = self.enter(node, resource)
        if not isinstance(node, dict | bool):
            raise RequestError(f"structured_outputs.json: {reference} at {place} leads to what is no schema")
        return Target(node, resource, (self.root.place if pointer else resource.place) + pointer)

    def _check_alone(self, keyword: str, place: str, count: int) -> None:
        if count > 1:
            raise RequestError(
                f"structured_outputs.json: {keyword} at {place} can't be obeyed: {count} parts with an $id have its "
                "anchor, and which one is meant depends on the way to it; use $ref"
            )


def pointer_step(name: str) -> str:
    """A name as a step of a JSON pointer."""
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
    """`uri` seen from `base`; urljoin knows of no paths in schemes such as urn."""
    return urljoin(base, uri)


def _note_anchors(node: Mapping[str, Any], resource: Resource, place: str) -> None:
    names = [node.get("$anchor"), node.get("$dynamicAnchor")]
    names += [str(node[key])[1:] for key in ("$id", "id") if str(node.get(key)).startswith("#")]
    for name in names:
        if isinstance(name, str):
            resource.anchors.setdefault(name, (node, place))
    if isinstance(node.get("$dynamicAnchor"), str):
        resource.dynamic.add(node["$dynamicAnchor"])
    resource.recursive = resource.recursive or (node is resource.root and node.get("$recursiveAnchor") is True)


def _children(node: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The subschemas directly inside of one, with their steps."""
    for name in _ONE:
        if isinstance(node.get(name), dict):
            yield name, node[name]
    for name in _LISTS:
        if isinstance(node.get(name), list):
            yield from ((f"{name}/{i}", child) for i, child in enumerate(node[name]))
    for name in _MAPS:
        if isinstance(node.get(name), dict):
            yield from ((f"{name}/{pointer_step(key)}", child) for key, child in node[name].items())
