"""What all endpoints of the API share: the served model, and what each request says about its place in the queue."""

import asyncio
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Header, Request
from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError
from starlette.responses import Response

from shoal.server.api.request_schemas import MAX_REPLICAS, SamplingFields
from shoal.server.backend import Backend
from shoal.server.http.errors import HttpError
from shoal.server.http.json_encoding import bytes_of
from shoal.server.http.work_threads import apart
from shoal.server.settings import ServerSettings
from shoal.values import shown, whole_number


def _digits(value: Any) -> Any:
    """Return the number in a header. (pydantic alone would also accept "1_0" and "+1".)"""
    number = whole_number(value, canonical=True) if isinstance(value, str) else value
    if value is not None and number is None:
        raise PydanticCustomError("int_parsing", "input should be a valid integer")
    return number


RankHeader = Annotated[
    int | None,
    BeforeValidator(_digits),
    Header(
        alias="X-data-parallel-rank",
        ge=0,
        lt=MAX_REPLICAS,
        description="The number of the only replica that may run the request, like the field `data_parallel_rank`.",
    ),
]


@dataclass(frozen=True, slots=True)
class Service:
    """The model that the endpoints serve, and the options of the server."""

    llm: Backend
    settings: ServerSettings
    started: int = field(default_factory=lambda: int(time.time()))
    large_requests: asyncio.Lock = field(default_factory=asyncio.Lock)  # held while a request of many outputs begins

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the model, the first for requests that give none."""
        return self.settings.served_model_names or (self.llm.model_name,)

    def model(self, asked: str | None) -> str:
        """Return the name of the model for the answer to a request.

        Raises:
            HttpError: the request asks for a model that is not served.
        """
        if asked is None:
            return self.names[0]
        if asked not in self.names:
            why = f"the model {shown(asked)} is not served; there is {', '.join(self.names)}"
            raise HttpError(404, why, param="model", code="model_not_found")
        return asked


@dataclass(frozen=True, slots=True)
class RequestPlacement:
    """When a request runs, and on which replica."""

    priority: int
    replica: int | None

    @classmethod
    def of(cls, body: SamplingFields, header: int | None) -> "RequestPlacement":
        """Read a body and the header `X-data-parallel-rank`. If both name a replica, the body counts."""
        return cls(body.priority or 0, header if body.data_parallel_rank is None else body.data_parallel_rank)


def new_id(kind: str, asked: str | None = None) -> str:
    """Return the id of an answer or of an item. `asked`: the id that the client chose."""
    return f"{kind}-{asked or uuid.uuid4().hex}"


async def respond(make: Callable[[], Any], size: int, headers: Mapping[str, str] | None = None) -> Response:
    """Return the answer that `make` gives, as JSON. `size`: about how many bytes it has."""
    return await apart(lambda: json_response(make(), headers), size)


def json_response(value: Any, headers: Mapping[str, str] | None = None) -> Response:
    return Response(bytes_of(value), headers=dict(headers or {}), media_type="application/json")


def client_gone(_: Request, __: Exception) -> Response:
    return Response(status_code=499)
