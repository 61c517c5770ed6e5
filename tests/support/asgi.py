"""Requests to an ASGI app in this process, without a server."""

from collections.abc import Iterable
from typing import Any

from starlette.types import ASGIApp, Message, Scope


async def get(
    app: ASGIApp, path: str, method: str = "GET", root_path: str = "", headers: Iterable[tuple[bytes, bytes]] = ()
) -> tuple[int, str]:
    """Send a request and return status and body of the answer."""
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "scheme": "http",
        "root_path": root_path,
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": list(headers),
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    answer: list[Message] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        answer.append(message)

    await app(scope, receive, send)
    return answer[0]["status"], b"".join(message.get("body", b"") for message in answer).decode()
