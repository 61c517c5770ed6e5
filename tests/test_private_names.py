"""Tests use public seams: each use of a private name of Shoal needs an argued exception.

These uses are found in the syntax trees under `tests`: a private attribute of anything but `self` and `cls`, a private
name that is imported from Shoal, and a private name as text in `setattr`, `getattr`, `delattr` and the like. Private
names of other libraries do not count (`tests/server/test_uvicorn_internals.py` lists these), nor do private names of
classes in the same test file.
"""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src" / "shoal"
PRIVATE = re.compile(r"_[a-zA-Z]\w*")
BY_TEXT = {"setattr", "getattr", "delattr", "hasattr", "patch", "object"}  # calls that take a name as text

# (file, name): why there is no better way.
ARGUED = {
    ("executors/test_robustness.py", name): "tells one rank of a step that the others do not get, which no caller can"
    for name in ("_executor", "_incarnation", "_links")
}
CEILING = 5


@cache
def private_names_of_ours() -> frozenset[str]:
    """Return the private functions, classes, variables and attributes that are defined anywhere in Shoal."""
    found: set[str] = set()
    for path in SOURCE.rglob("*.py"):
        found |= {name for name in defined(ast.parse(path.read_text("utf-8"))) if PRIVATE.fullmatch(name)}
    return frozenset(found)


def defined(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield name


def private_uses(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Return the line and the name of each use of a private name of Shoal."""
    own = {name for each in ast.walk(tree) if isinstance(each, ast.ClassDef) for name in defined(each)}
    foreign = {
        alias.asname or alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if not alias.name.startswith("shoal")
    }
    for node in ast.walk(tree):
        names: list[str] = []
        match node:
            case ast.Attribute(value=ast.Name(id=owner), attr=name):
                names = [] if owner in {"self", "cls"} | foreign or name in own else [name]
            case ast.Attribute(attr=name):
                names = [] if name in own else [name]
            case ast.ImportFrom(module=str(module)) if module.startswith("shoal"):
                names = [alias.name for alias in node.names]
            case ast.Call(func=ast.Attribute(attr=called) | ast.Name(id=called)) if called in BY_TEXT:
                texts = [each.value for each in node.args if isinstance(each, ast.Constant)]
                names = [text.rpartition(".")[2] for text in texts if isinstance(text, str)]
        line = getattr(node, "lineno", 0)
        yield from ((line, name) for name in names if name in private_names_of_ours())


@pytest.mark.slow
def test_few_tests_reach_for_private_names() -> None:
    found: Counter[tuple[str, str]] = Counter()
    places: dict[tuple[str, str], str] = {}
    for path in sorted(TESTS.rglob("*.py")):
        where = path.relative_to(TESTS).as_posix()
        for line, name in private_uses(ast.parse(path.read_text("utf-8"))):
            found[where, name] += 1
            places[where, name] = f"{where}:{line} uses {name}"
    unargued = [places[each] for each in found if each not in ARGUED]
    assert not unargued, "; ".join(unargued) + ": test what is public, make it public, or pass it in"
    assert not [each for each in ARGUED if each not in found], "an exception that is not needed any more"
    assert found.total() <= CEILING


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("from shoal.server.serve import _drain", ["_drain"]),
        ("llm._streams.clear()", ["_streams"]),
        ("self._streams.clear()", []),
        ("class Mine:\n    def __init__(self):\n        self._streams = 0\nMine()._streams", []),
        ("import os\nos._streams", []),
        ("monkeypatch.setattr(llm, '_streams', {})", ["_streams"]),
        ("monkeypatch.setattr('shoal.server.serve._drain', None)", ["_drain"]),
        ("print('_streams')", []),
        ("other._never_heard_of", []),
    ],
)
def test_uses_of_private_names_are_found(text: str, names: list[str]) -> None:
    assert [name for _, name in private_uses(ast.parse(text))] == names
