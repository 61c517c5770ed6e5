"""The internal parts of uvicorn that Shoal uses, although uvicorn does not promise to keep them.

pyproject.toml limits uvicorn to the versions with which this file passed. To raise the limit, run this file with the
newer version first: each failure names a part that has changed, and Shoal uses these parts in the modules below.
"""

import ast
import asyncio
import inspect
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import uvicorn
from packaging.requirements import Requirement
from packaging.version import Version
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from shoal.server.http import http10, listening, protocol

ROOT = Path(__file__).parent.parent.parent
MODULES = (protocol, http10, listening)

# Methods that Shoal overrides, and how uvicorn calls them.
PROTOCOL_METHODS = {
    "connection_made": ["transport"],
    "connection_lost": ["exc"],
    "data_received": ["data"],
    "_start_asgi_task": ["cycle", "app"],
    "on_message_begin": [],
    "on_url": ["url"],
    "on_header": ["name", "value"],
    "on_headers_complete": [],
    "on_body": ["body"],
    "on_message_complete": [],
    "on_response_complete": [],
    "pause_writing": [],
    "resume_writing": [],
    "send_400_response": ["msg"],
}
SERVER_METHODS = {"capture_signals": [], "shutdown": ["sockets"]}

# Attributes that Shoal reads or sets.
PROTOCOL_ATTRIBUTES = {
    "connections", "cycle", "headers", "loop", "parser", "pipeline", "timeout_keep_alive", "transport", "url",
}  # fmt: skip
CYCLE_ATTRIBUTES = {
    "chunked_encoding", "disconnected", "expected_content_length", "keep_alive", "message_event", "response_complete",
    "response_started", "scope", "waiting_for_100_continue",
}  # fmt: skip
SERVER_ATTRIBUTES = {"config", "force_exit", "server_state", "should_exit"}


def moved(part: str) -> str:
    users = ", ".join(module.__name__ for module in MODULES)
    return f"uvicorn {uvicorn.__version__} has changed {part}. Shoal uses it in {users}"


METHODS = [
    *((HttpToolsProtocol, name, parameters) for name, parameters in PROTOCOL_METHODS.items()),
    *((uvicorn.Server, name, parameters) for name, parameters in SERVER_METHODS.items()),
]


@pytest.mark.parametrize(("owner", "name", "parameters"), METHODS, ids=[name for _, name, _ in METHODS])
def test_an_overridden_method_has_the_known_parameters(owner: type, name: str, parameters: list[str]) -> None:
    method = getattr(owner, name, None)
    assert method is not None, moved(f"{owner.__name__}.{name} (it is gone)")
    found = [*inspect.signature(method).parameters]
    assert found == ["self", *parameters], moved(f"{owner.__name__}.{name}, whose parameters are {found}")


def test_status_lines_have_the_known_form() -> None:
    line = STATUS_LINE.get(431)
    assert line == b"HTTP/1.1 431 Request Header Fields Too Large\r\n", moved(
        f"STATUS_LINE, which has {line!r} for 431"
    )


def test_a_server_has_the_known_attributes() -> None:
    server = uvicorn.Server(uvicorn.Config("none"))
    missing = SERVER_ATTRIBUTES - set(vars(server))
    assert not missing, moved(f"Server, which lacks {missing}")
    assert isinstance(server.server_state.connections, set), moved("ServerState.connections")
    assert hasattr(server.config, "timeout_graceful_shutdown"), moved("Config.timeout_graceful_shutdown")


class Transport(asyncio.Transport):
    """A transport that keeps the written bytes and sends them nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = False

    def write(self, data: Any) -> None:
        self.written += data

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


async def answer(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body"})


def watched(calls: list[str]) -> type[HttpToolsProtocol]:
    """Return uvicorn's protocol with the methods that Shoal overrides; `calls` gets the names of the called ones."""

    def watching(name: str) -> Callable[..., Any]:
        def method(self: HttpToolsProtocol, *arguments: Any) -> Any:
            calls.append(name)
            return getattr(HttpToolsProtocol, name)(self, *arguments)

        return method

    return type("Watched", (HttpToolsProtocol,), {name: watching(name) for name in PROTOCOL_METHODS})


def test_a_connection_has_the_known_attributes_and_calls_the_overridden_methods() -> None:
    calls: list[str] = []

    async def scenario() -> None:
        config = uvicorn.Config(answer, ws="none", lifespan="off", log_config=None)
        state, transport = ServerState(), Transport()
        connection = watched(calls)(config=config, server_state=state, app_state={})
        connection.connection_made(transport)
        assert connection in state.connections, moved("ServerState.connections")
        connection.data_received(b"POST /1 HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n\r\n.")
        connection.data_received(b"GET /2 HTTP/1.1\r\nhost: x\r\n\r\n")

        missing = PROTOCOL_ATTRIBUTES - set(vars(connection))
        assert not missing, moved(f"HttpToolsProtocol, which lacks {missing}")
        missing = CYCLE_ATTRIBUTES - set(vars(connection.cycle))
        assert not missing, moved(f"RequestResponseCycle, which lacks {missing}")
        waiting = [(cycle.scope["path"], app) for cycle, app in connection.pipeline]
        assert waiting == [("/2", connection.app)], moved("HttpToolsProtocol.pipeline: pairs of a cycle and an app")
        assert calls.count("_start_asgi_task") == 1, moved("HttpToolsProtocol._start_asgi_task: one request at a time")

        while state.tasks:
            await asyncio.gather(*state.tasks)
        assert transport.written.count(STATUS_LINE[200]) == 2
        assert connection.cycle.response_complete, moved("RequestResponseCycle.response_complete")
        assert calls.count("on_response_complete") == 2, moved("RequestResponseCycle.on_response")
        connection.data_received(b"nothing like HTTP\r\n\r\n")
        connection.connection_lost(None)

    asyncio.run(scenario())
    silent = set(PROTOCOL_METHODS) - set(calls) - {"pause_writing", "resume_writing"}  # the transport calls these
    assert not silent, moved(f"HttpToolsProtocol, which no longer calls {silent}")


# --- the lists above are complete ------------------------------------------------------------------------------------


def attributes(tree: ast.AST, *names: str) -> Iterator[str]:
    """Yield each attribute that is read from a variable or attribute with one of the names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = node.value
            name = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
            if name in names:
                yield node.attr


def used_of_base(kind: type, module: ModuleType) -> set[str]:
    """Return the attributes of `self` that methods of a class use but the class does not define."""
    tree = ast.parse(inspect.getsource(module))
    (body,) = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == kind.__name__]
    own = {*vars(kind), *vars(kind).get("__annotations__", {})}
    return {name for name in attributes(body, "self") if name not in own and not name.startswith("_")}


def overridden(kind: type, base: type) -> set[str]:
    return {name for name in vars(kind) if hasattr(base, name) and not name.startswith("__")}


def test_the_lists_are_complete() -> None:
    assert overridden(protocol.BoundedProtocol, HttpToolsProtocol) == set(PROTOCOL_METHODS)
    assert overridden(listening.Server, uvicorn.Server) == set(SERVER_METHODS)
    assert used_of_base(protocol.BoundedProtocol, protocol) == PROTOCOL_ATTRIBUTES
    assert used_of_base(listening.Server, listening) == SERVER_ATTRIBUTES
    trees = [ast.parse(inspect.getsource(module)) for module in MODULES]
    assert {name for tree in trees for name in attributes(tree, "cycle", "_cycle")} == CYCLE_ATTRIBUTES
    assert {name for tree in trees for name in attributes(tree, "connection")} <= PROTOCOL_ATTRIBUTES


def test_the_version_is_bounded_from_above() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (wanted,) = [found for found in map(Requirement, listed) if found.name == "uvicorn"]
    (tested,) = re.findall(r"^uvicorn==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    following = f"{Version(tested).major}.{Version(tested).minor + 1}"
    assert tested in wanted.specifier, f"constraints.txt has {tested}, but pyproject.toml wants {wanted}"
    assert following not in wanted.specifier, f"pyproject.toml wants {wanted}, but {following} was never tested"
