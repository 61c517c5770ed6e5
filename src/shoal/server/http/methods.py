"""HEAD and OPTIONS for every path, and which methods a path takes."""

from collections.abc import Iterable

from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_ASKED = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")


class CommonMethods:
    """ASGI middleware: HEAD is GET without a body, and OPTIONS lists the methods of a path."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            await self._head(scope, receive, send)
        elif scope["type"] == "http" and scope["method"] == "OPTIONS" and (methods := allowed(scope)):
            await Response(status_code=204, headers={"allow": ", ".join(methods)})(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _head(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def bare(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        asked = {**scope, "method": "GET"}
        try:
            await self._app(asked, receive, bare)
        finally:
            scope["route"] = asked.get("route")  # the counts of requests go by it


def allowed(scope: Scope) -> list[str]:
    """Return the methods that a request's path takes beside OPTIONS; an empty list if there is no such path."""
    routes: Iterable[BaseRoute] = scope["app"].routes
    return [method for method in _ASKED if _takes(routes, {**scope, "method": "GET" if method == "HEAD" else method})]


def _takes(routes: Iterable[BaseRoute], scope: Scope) -> bool:
    return any(route.matches(scope)[0] is Match.FULL for route in routes)
