"""Reading the bodies of requests and checking them against their schemas, in small steps off the event loop."""

import email.message
import json
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.responses import Response

from shoal.errors import RequestError
from shoal.server.api.request_schemas import Body
from shoal.server.http.errors import HttpError
from shoal.server.http.json_reader import JsonReader, may_have_surrogates, refuse_surrogates
from shoal.server.http.limits import RequestLimits
from shoal.server.http.work_threads import off_loop

B = TypeVar("B", bound=BaseModel)
_LIMITS = RequestLimits()
_BOM = b"\xef\xbb\xbf"


class UnreadBodies:
    """The bodies that are being read. Reading takes more memory than the bodies themselves, so there is a limit.

    Args:
        most: bytes of all these bodies together.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._held = 0

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Count a body while the block runs.

        Raises:
            HttpError: too many other bodies are being read.
        """
        if self._held and self._held + size > self._most:
            raise HttpError(503, "too many large requests are being read: try again", retry_after=1.0)
        self._held += size
        try:
            yield
        finally:
            self._held -= size


_unread = UnreadBodies(_LIMITS.bodies_bytes)


class BodyRoute(APIRoute):
    """A route that reads the body itself, and gives FastAPI the finished object."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        model = None if self.body_field is None else self.body_field.field_info.annotation
        if model is None:
            return handler
        assert isinstance(model, type)
        assert issubclass(model, BaseModel), "a body is an object"

        async def handle(request: Request) -> Response:
            body = await request.body()
            if body and _is_json(request.headers.get("content-type", "")):
                with _unread.hold(len(body)):
                    found = await off_loop(partial(read_body, body, model), len(body))
                request = _ReadRequest(request.scope, request.receive, found)
            return await handler(request)

        return handle


def router(tag: str) -> APIRouter:
    """Return a router for the endpoints under a heading of the description.

    All endpoints that have a body must be on such a router.
    """
    return APIRouter(tags=[tag], route_class=BodyRoute)


class _ReadRequest(Request):
    def __init__(self, scope: Any, receive: Any, found: BaseModel) -> None:
        super().__init__(scope, receive)
        self._body = b"read"
        self._found = found

    async def json(self) -> BaseModel:
        return self._found


def _is_json(content_type: str) -> bool:
    message = email.message.Message()
    message["content-type"] = content_type
    subtype = message.get_content_subtype()
    return message.get_content_maintype() == "application" and (subtype == "json" or subtype.endswith("+json"))


def read_body(body: bytes, model: type[B], limits: RequestLimits = _LIMITS) -> B:
    """Return a body as an object of its schema.

    Raises:
        RequestError, HttpError: it is not UTF-8, it has more values or levels than `limits` allow, or it has a number
            or a text that JSON allows but Python can't hold.
        RequestValidationError: it is not JSON, or does not fit the schema.
    """
    given = read_json(body, limits)
    try:
        found = model.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise RequestValidationError([{**first, "loc": ("body", *first["loc"])}]) from None
    if isinstance(found, Body):
        found.set_size(len(body))
    return found


def read_json(body: bytes, limits: RequestLimits = _LIMITS) -> Any:
    """Return a body as plain values. Errors are those of `read_body`."""
    if b"\0" in body[:4] or body[:2] in (b"\xff\xfe", b"\xfe\xff"):  # UTF-16 or UTF-32, which JSON once allowed
        raise RequestError("the body must be UTF-8", code="invalid_json")
    try:
        text = body.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"the body must be UTF-8: {error.reason} at byte {error.start}", code="invalid_json"
        ) from None
    reader = JsonReader(
        text,
        most_values=limits.body_values,
        most_containers=limits.body_containers,
        most_depth=limits.json_depth,
    )
    try:
        found = reader.read()
    except json.JSONDecodeError as error:
        detail = {"type": "json_invalid", "loc": ("body", error.pos), "msg": "JSON decode error", "input": {}}
        raise RequestValidationError([{**detail, "ctx": {"error": error.msg}}]) from None
    if may_have_surrogates(text):
        refuse_surrogates(found)
    return found
