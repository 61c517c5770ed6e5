"""An id for each HTTP request: in the `x-request-id` header of its answer, and in the log when it fails."""

import re
import uuid
from contextvars import ContextVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = b"x-request-id"
_NAME = re.compile(rb"[\w.:/+=@-]{1,128}")  # of ids that clients choose

current: ContextVar[str] = ContextVar("current", default="")


class RequestIds:
    """ASGI middleware that gives each request an id. A client's own is kept if it is short and plain."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for key, value in scope["headers"] if key == HEADER), b"")
        name = given if _NAME.fullmatch(given) else uuid.uuid4().hex.encode()

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (HEADER, name)]}
            await send(message)

        token = current.set(name.decode())
        try:
            await self._app(scope, receive, named)
        finally:
            current.reset(token)
