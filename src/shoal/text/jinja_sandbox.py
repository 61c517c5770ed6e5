"""Compiling and rendering chat templates in Jinja, in a sandbox, since they are code from strangers.

Templates on the hub expect the functions and filters of
https://huggingface.co/docs/transformers/chat_templating_writing.
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

_MAX_ITERATIONS = 2_000_000  # of all loops in one rendering
_BUDGET, _COUNT_FILTER = "_shoal_turns", "_shoal_counted"
_END_GENERATION = "endgeneration"
_TYPE_TESTS = {"string", "iterable", "sequence", "mapping"}  # a template with such a test handles both kinds of content


@dataclass(frozen=True, slots=True)
class Template:
    """A compiled chat template."""

    reads_parts: bool  # the content of a message may be a list of parts, over which the template loops
    reads_texts: bool  # the content of a message may be a text
    _render: Callable[[Mapping[str, Any]], str]

    def render(self, values: Mapping[str, Any]) -> str:
        """Return the text that the template makes of `values`, such as the messages.

        Raises:
            RequestError: the template refuses the values, or fails.
        """
        try:
            return self._render({**values, _BUDGET: _LoopBudget()})
        except _TemplateRefused as error:
            why = f"the chat template refuses the conversation: {_one_line(error)}"
            raise RequestError(why, "messages") from None
        except Exception as error:  # noqa: BLE001 - a template may do anything that Python's operators do
            why = f"the chat template fails: {type(error).__name__}: {_one_line(error)}"
            raise RequestError(why, "messages") from None


@lru_cache(maxsize=16)
def compile(source: str) -> Template:
    """Compile a chat template.

    Raises:
        RequestError: the source is not a valid template.
    """
    try:
        tree = _environment.parse(source)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, _COUNT_FILTER, [], [], None, None, lineno=loop.lineno)
        template = _environment.from_string(tree)
        tree = _environment.parse(source)
    except jinja2.TemplateSyntaxError as error:
        why = f"the chat template is malformed, in line {error.lineno}: {_one_line(error)}"
        raise RequestError(why, "chat_template") from None
    except (RecursionError, ValueError, TypeError) as error:
        raise RequestError(f"the chat template is malformed: {_one_line(error)}", "chat_template") from None
    parts = _reads_parts(tree)
    return Template(parts, not parts or _tests_type(tree), template.render)


class _TemplateRefused(jinja2.TemplateError):
    """The template called `raise_exception`, or its loops run too long."""


class _LoopBudget:
    """The number of iterations that the loops of one rendering may still make; nested loops could run for years."""

    def __init__(self) -> None:
        self._left = _MAX_ITERATIONS

    def take(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise _TemplateRefused(f"its loops have more than {_MAX_ITERATIONS} iterations")

    def counted_one_by_one(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.take(1)
            yield value


@jinja2.pass_context
def _count_iterations(context: Context, values: Any) -> Any:
    """Return the values of a loop, after counting them against the budget of the rendering."""
    budget = context.resolve(_BUDGET)
    if not isinstance(values, Sized):
        return budget.counted_one_by_one(values)
    budget.take(len(values))
    return values


class _Generation(Extension):
    """The tag `{% generation %}`, which marks the model's own text for training. It changes nothing here."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it like this

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements((f"name:{_END_GENERATION}",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _refuse(message: object) -> NoReturn:
    raise _TemplateRefused(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson`, without the escapes for HTML of Jinja's own filter."""
    # In small steps: `json.dumps` would block all other threads while it writes a large value.
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return "".join(encoder.iterencode(value))


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _make_environment() -> ImmutableSandboxedEnvironment:
    extensions = [_Generation, loopcontrols]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _to_json
    environment.filters[_COUNT_FILTER] = _count_iterations
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    return environment


_environment = _make_environment()


def _reads_parts(tree: nodes.Template) -> bool:
    """Return whether the template has a loop over the content of a message."""
    content = {"content"} | {name for name, value in _assignments(tree) if _is_content(value, set())}
    return any(_is_content(loop.iter, content) for loop in tree.find_all(nodes.For))


def _assignments(tree: nodes.Template) -> Iterator[tuple[str, nodes.Node]]:
    for node in tree.find_all(nodes.Assign):
        if isinstance(node.target, nodes.Name):
            yield node.target.name, node.node


def _is_content(node: nodes.Node | None, names: set[str]) -> bool:
    """Return whether an expression is the content of a message.

    That is `message.content`, `message["content"]`, one of the variables `names`, or one of these with filters.
    """
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


def _tests_type(tree: nodes.Template) -> bool:
    return any(test.name in _TYPE_TESTS for test in tree.find_all(nodes.Test))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
