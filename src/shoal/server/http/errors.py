"""Errors as answers, in the form of OpenAI's API: `{"error": {"message", "type", "param", "code"}}`.

OpenAI's API reference describes the form under "Error codes".
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from shoal.errors import UNPROCESSABLE, ClosedError, EngineError, QueueFull, RequestError, Unavailable
from shoal.log import get_logger
from shoal.server.http import request_ids
from shoal.server.http.json_encoding import bytes_of
from shoal.server.http.methods import allowed
from shoal.values import shown

log = get_logger("server")

# status -> (type, code of an error that has none of its own)
_KINDS = {
    400: ("invalid_request_error", "invalid_value"),
    401: ("invalid_request_error", "invalid_api_key"),
    403: ("permission_error", "forbidden"),
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("invalid_request_error", "request_timeout"),
    413: ("invalid_request_error", "request_too_large"),
    415: ("invalid_request_error", "unsupported_media_type"),
    422: ("invalid_request_error", "unprocessable"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    431: ("invalid_request_error", "headers_too_large"),
    500: ("server_error", "internal_error"),
    503: ("server_error", "unavailable"),
}
_INTERNAL = "the request failed because of an error in the server; the log of the server has the details"
_CLOSED_RETRY_S = 10.0  # a server that has closed is replaced soon, if at all
_MOST_CHARACTERS = 1000  # of a message


class ErrorObject(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    error: ErrorObject


class HttpError(Exception):
    """An error as the client gets it.

    Code that knows nothing of HTTP raises a `RequestError`; this class is for errors with another status.

    Args:
        param: the field that is at fault, by the client's name for it.
        code: the kind of mistake, for programs; None: the usual one of the status.
        retry_after: seconds after which the client should try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        kind, code = _KINDS.get(self.status) or _KINDS[400 if self.status < 500 else 500]
        text = self.message if len(self.message) <= _MOST_CHARACTERS else self.message[:_MOST_CHARACTERS] + "..."
        return {"error": {"message": text, "type": kind, "param": self.param, "code": self.code or code}}

    def response(self, headers: Mapping[str, str] | None = None) -> Response:
        found = dict(headers or {})
        if self.retry_after is not None:
            found["retry-after"] = str(max(1, math.ceil(self.retry_after)))
        return Response(bytes_of(self.body()), self.status, found, media_type="application/json")


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the errors of an endpoint, for its description. Those that every endpoint may answer with are added."""
    return {
        status: {"model": ErrorAnswer, "description": HTTPStatus(status).phrase}
        for status in sorted({400, 401, 413, 415, 431, 500, *statuses})
    }


GENERATION_ERRORS = documented(404, 422, 429, 503)  # of an endpoint that generates text


def http_error(error: BaseException) -> HttpError:
    """Return any error as the client gets it. An internal error is logged in full; the client only hears of it."""
    match error:
        case HttpError():
            return error
        case RequestError():
            status = 422 if error.code == UNPROCESSABLE else 400
            return HttpError(status, error.message, param=error.param, code=error.code)
        case QueueFull():
            return HttpError(429, str(error), retry_after=error.retry_after)
        case Unavailable() | ClosedError():
            after = error.retry_after if isinstance(error, Unavailable) else _CLOSED_RETRY_S
            return HttpError(503, str(error), retry_after=after)
        case EngineError():
            return HttpError(500, str(error), code="engine_error")
    log.error("request %s failed: %s", request_ids.current.get(), error, exc_info=error)
    return HttpError(500, _INTERNAL)


@contextmanager
def named_by_client(names: Mapping[str, str]) -> Iterator[None]:
    """Raise each `RequestError` of the block again, with the client's name for the parameter that is at fault.

    Args:
        names: our names of parameters -> the client's names, where they differ.
    """
    try:
        yield
    except RequestError as error:
        raise _renamed(error, names) from None


def _renamed(error: RequestError, names: Mapping[str, str]) -> RequestError:
    if error.param is None:
        return error
    whole, _, _ = error.param.partition("[")  # "messages[2].role" is a part of "messages"
    name = names.get(error.param) or names.get(whole)
    return error if name is None else error.renamed(name)


def from_validation(errors: Sequence[Any]) -> RequestError:
    """Return the first of the mistakes that pydantic has found in a body or in parameters of the URL."""
    first = errors[0]
    kind, (place, *path) = first["type"], first["loc"]
    if kind == "json_invalid":
        why = f"the body is not JSON: {first['ctx']['error']} at character {path[0]}"
        return RequestError(why, code="invalid_json")
    if place == "body" and not path:
        return RequestError("the body must be a JSON object, with content-type application/json", code="invalid_json")
    field = _path(path)
    if kind == "missing":
        return RequestError(f"{field} is missing", field, "missing_required_parameter")
    message = str(first["msg"]).removeprefix("Value error, ")
    return RequestError(f"{field}: {message[:1].lower()}{message[1:]}, got {shown(first.get('input'))}", field)


def _path(path: Sequence[str | int]) -> str:
    """Return the name of a field from pydantic's path to it, such as `messages[0].role`.

    In a union the path goes on with the name of a type, which the client did not write: there the name ends.
    """
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        elif not text:
            text = step
        elif step.isidentifier() and step not in ("str", "int", "float", "bool", "list", "dict"):
            text += f".{step}"
        else:
            break
    return text


# --- handlers ------------------------------------------------------------------------------------------------------


def add_handlers(app: FastAPI) -> None:
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(HTTPException, _on_http)
    for kind in (HttpError, RequestError, EngineError, Exception):
        app.add_exception_handler(kind, _on_error)


async def _on_error(_: Request, error: Exception) -> Response:
    return http_error(error).response()


async def _on_validation(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return http_error(from_validation(error.errors())).response()


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    messages = {
        400: "the body can't be read as JSON: it must be UTF-8, not nested too deeply, and have no infinite numbers",
        404: f"there is nothing at {shown(request.url.path)}",
        405: f"{shown(request.url.path)} does not take {request.method}",
    }
    answer = HttpError(error.status_code, messages.get(error.status_code, str(error.detail)))
    headers = {"allow": ", ".join(allowed(request.scope))} if error.status_code == 405 else error.headers
    return answer.response(headers)
