"""Jinja for chat templates: with the names that those on the hub expect, and in a sandbox, for they are foreign code.

The names are those of https://huggingface.co/docs/transformers/chat_templating_writing.
"""

import datetime
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shoal.errors import RequestError

_MOST_TURNS = 2_000_000
_TURNS, _COUNTED = "_shoal_turns", "_shoal_counted"
_END_GENERATION = "endgeneration"
_KIND_TESTS = {"string", "iterable", "sequence", "mapping"}  # a template that asks is ready for both


@dataclass(frozen=True, slots=True)
class Template:
    reads_parts: bool  # content may be a list of parts: it goes through them
    reads_texts: bool  # content may be a text
    _render: Callable[[Mapping[str, Any]], str]

    def render(self, values: Mapping[str, Any]) -> str:
        """Raises:
        RequestError: the template refuses the values, or fails on them.
        """
        try:
            return self._render({**values, _TURNS: _Turns()})
        except _Refused as error:
            raise RequestError(f"the chat template refuses the conversation: {_line(error)}") from None
        except Exception as error:  # noqa: BLE001 - a template may do anything that Python's operators do
            raise RequestError(f"the chat template fails: {type(error).__name__}: {_line(error)}") from None


@lru_cache(maxsize=16)
def compile(source: str) -> Template:
    """Raises:
    RequestError: it is no template.
    """
    try:
        tree = _environment.parse(source)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, _COUNTED, [], [], None, None, lineno=loop.lineno)
        template = _environment.from_string(tree)
        tree = _environment.parse(source)
    except jinja2.TemplateSyntaxError as error:
        raise RequestError(f"the chat template is malformed, in line {error.lineno}: {_line(error)}") from None
    except (RecursionError, ValueError, TypeError) as error:
        raise RequestError(f"the chat template is malformed: {_line(error)}") from None
    parts = _reads_parts(tree)
    return Template(parts, not parts or _asks_for_the_kind(tree), template.render)


class _Refused(jinja2.TemplateError):
    pass


class _Turns:
    """Of the loops of one rendering: loops in loops could go on for years."""

    def __init__(self) -> None:
        self._left = _MOST_TURNS

    def take(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise _Refused(f"its loops have more than {_MOST_TURNS} turns")

    def each(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.take(1)
            yield value


@jinja2.pass_context
def _counted(context: Context, values: Any) -> Any:
    """What a loop goes over, if it may."""
    turns = context.resolve(_TURNS)
    if not isinstance(values, Sized):
        return turns.each(values)
    turns.take(len(values))
    return values


class _Generation(Extension):
    """`{% generation %}` marks what the model said, for training: here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements((f"name:{_END_GENERATION}",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _refuse(message: object) -> NoReturn:
    raise _Refused(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes what HTML would."""
    # In steps: `dumps` would keep all other threads waiting for as long as a large value takes.
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return "".join(encoder.iterencode(value))


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _make_environment() -> ImmutableSandboxedEnvironment:
    extensions = [_Generation, loopcontrols]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _to_json
    environment.filters[_COUNTED] = _counted
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    return environment


_environment = _make_environment()


def _reads_parts(tree: nodes.Template) -> bool:
    """Is there a loop over the content of a message?"""
    content = {"content"} | {name for name, value in _assignments(tree) if _is_content(value, set())}
    return any(_is_content(loop.iter, content) for loop in tree.find_all(nodes.For))


def _assignments(tree: nodes.Template) -> Iterator[tuple[str, nodes.Node]]:
    for node in tree.find_all(nodes.Assign):
        if isinstance(node.target, nodes.Name):
            yield node.target.name, node.node


def _is_content(node: nodes.Node | None, names: set[str]) -> bool:
    """`message.content`, `message["content"]`, a name that stands for it, or one of them through filters."""
    match node:
        case nodes.Filter(node=inner):
            return _is_content(inner, names)
        case nodes.Getattr(attr=attribute):
            return attribute == "content"
        case nodes.Getitem(arg=nodes.Const(value=key)):
            return bool(key == "content")
        case nodes.Name(name=name):
            return name in names
    return False


def _asks_for_the_kind(tree: nodes.Template) -> bool:
    return any(test.name in _KIND_TESTS for test in tree.find_all(nodes.Test))


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
