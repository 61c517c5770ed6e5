"""Everything that goes wrong, as OpenAI's error objects: `{"error": {"message", "type", "param", "code"}}`.

The forms are those of OpenAI's API reference, "Error codes".
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from shoal.errors import ClosedError, EngineError, QueueFull, RequestError, Unavailable, overflow
from shoal.log import get_logger
from shoal.params import SamplingParams
from shoal.server.http import request_ids
from shoal.server.http.json_encoding import bytes_of
from shoal.server.http.methods import allowed
from shoal.values import shown

log = get_logger("server")

# status -> (type, code)
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
_INTERNAL = "something went wrong in the server; its log says what"
_CLOSED_RETRY_S = 10.0  # a server that ends is soon replaced, if at all
_MOST = 1000  # characters of a message


class ErrorObject(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    error: ErrorObject


class Refusal(Exception):
    """A request that is answered with an error. `param`: the field, as the client wrote it."""

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
        text = self.message if len(self.message) <= _MOST else self.message[:_MOST] + "..."
        return {"error": {"message": text, "type": kind, "param": self.param, "code": self.code or code}}

    def response(self, headers: Mapping[str, str] | None = None) -> Response:
        found = dict(headers or {})
        if self.retry_after is not None:
            found["retry-after"] = str(max(1, math.ceil(self.retry_after)))
        return Response(bytes_of(self.body()), self.status, found, media_type="application/json")


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What an endpoint's description says of the errors it may answer with."""
    return {
        status: {"model": ErrorAnswer, "description": HTTPStatus(status).phrase}
        for status in sorted({400, 401, 413, 415, 431, 500, *statuses})
    }


ANSWERING = documented(404, 422, 429, 503)  # of an endpoint that has the model answer


def refusal_of(error: BaseException) -> Refusal:
    """Any error, as it is told to the client. What is nobody's but ours is logged, and told without its particulars."""
    match error:
        case Refusal():
            return error
        case RequestError():
            return of_request(error)
        case QueueFull():
            return Refusal(429, str(error), retry_after=error.retry_after)
        case Unavailable() | ClosedError():
            after = error.retry_after if isinstance(error, Unavailable) else _CLOSED_RETRY_S
            return Refusal(503, str(error), retry_after=after)
        case EngineError():
            return Refusal(500, str(error), code="engine_error")
    log.error("request %s failed: %s", request_ids.current.get(), error, exc_info=error)
    return Refusal(500, _INTERNAL)


# --- fields --------------------------------------------------------------------------------------------------------

_OURS = frozenset(f.name for f in dataclasses.fields(SamplingParams))
_OTHERS = {"tools", "chat_template", "chat_template_kwargs", "continue_final_message", "priority", "cache_salt"}
_QUOTED = re.compile(r"^`([\w.\[\]]+)`")
_MESSAGE = re.compile(r"^message (\d+)(?:, part (\d+))?\b")
_OVERFLOW = overflow(0).partition("0")[0]
_WORD = re.compile(r"^(?:unknown kind of )?([a-z_]+)\b")


def of_request(
    error: RequestError, names: Mapping[str, str] | None = None, *, prompt: str | None = None, prepared: bool = False
) -> Refusal:
    """A refusal that names the field.

    Args:
        names: our name of a parameter -> the client's.
        prompt: the field that the prompt is in; at fault where no other is.
        prepared: the parameters' values were found right; it came when they were held against the model. A structured
            output that fails then is well-formed but can't be obeyed.
    """
    message = str(error)
    if message.startswith(_OVERFLOW):
        return Refusal(400, message, param=prompt, code="context_length_exceeded")
    if found := _QUOTED.match(message):
        return Refusal(400, message, param=found[1])
    if found := _MESSAGE.match(message):
        part = f".content[{found[2]}]" if found[2] else ""
        return Refusal(400, message, param=f"messages[{found[1]}]{part}" if prompt in (None, "messages") else prompt)
    if message.startswith("there is no replica"):
        return Refusal(400, message, param="data_parallel_rank")
    found = _WORD.match(message)
    ours = found[1] if found else ""
    if ours not in _OURS:
        return Refusal(400, message, param=ours if ours in _OTHERS else prompt)
    theirs = (names or {}).get(ours, ours)
    status = 422 if prepared and ours == "structured_outputs" else 400
    written = message if theirs == ours else re.sub(rf"\b{ours}(\.\w+)?", theirs, message, count=1)
    return Refusal(status, written, param=theirs)


def of_validation(errors: Sequence[Any]) -> Refusal:
    """What pydantic found; the first of it is told."""
    first = errors[0]
    kind, (place, *path) = first["type"], first["loc"]
    if kind == "json_invalid":
        return Refusal(
            400, f"the body is not JSON: {first['ctx']['error']} at character {path[0]}", code="invalid_json"
        )
    if place == "body" and not path:
        return Refusal(400, "the body must be a JSON object, with content-type application/json", code="invalid_json")
    field = _path(path)
    if kind == "missing":
        return Refusal(400, f"{field} is missing", param=field, code="missing_required_parameter")
    message = str(first["msg"]).removeprefix("Value error, ")
    return Refusal(400, f"{field}: {message[:1].lower()}{message[1:]}, got {shown(first.get('input'))}", param=field)


def _path(path: Sequence[str | int]) -> str:
    """`messages[0].role`; from a union's branch on, which is no name, nothing more."""
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
    for kind in (Refusal, RequestError, EngineError, Exception):
        app.add_exception_handler(kind, _on_error)


async def _on_error(_: Request, error: Exception) -> Response:
    return refusal_of(error).response()


async def _on_validation(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return of_validation(error.errors()).response()


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = {
        400: "the body can't be read as JSON: it must be UTF-8, and neither nested too deeply nor with endless numbers",
        404: f"there is nothing at {shown(request.url.path)}",
        405: f"{shown(request.url.path)} does not take {request.method}",
    }
    refused = Refusal(error.status_code, told.get(error.status_code, str(error.detail)))
    headers = {"allow": ", ".join(allowed(request.scope))} if error.status_code == 405 else error.headers
    return refused.response(headers)
