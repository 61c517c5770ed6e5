"""GET /v1/admin/status: all replicas and ranks, as JSON whose keys are the fields of FleetStatus and its parts.

It has counters and gauges only. For a rate, read it twice and divide by the difference of `uptime_s`.
"""

import asyncio
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from pydantic_core import to_json

from shoal import __version__
from shoal.activity import Activity
from shoal.server.backend import Backend
from shoal.wire.base import Wire
from shoal.wire.fleet import FleetStatus


def routes(llm: Backend) -> APIRouter:
    router = APIRouter(tags=["admin"])

    @router.get(
        "/v1/admin/status", summary="Replicas, ranks and queue, with their counters", response_class=JSONResponse
    )
    async def status() -> Response:
        body = await asyncio.to_thread(_body, await llm.status())  # takes long for a thousand replicas
        return Response(body, headers={"Cache-Control": "no-store"}, media_type="application/json")

    return router


def _body(status: FleetStatus) -> bytes:
    return to_json(status_json(status))


def status_json(status: FleetStatus) -> dict[str, Any]:
    """Return a status as JSON, with the server's `version` added, and to each rank its `host`."""
    found: dict[str, Any] = {"version": __version__, **_fields(status)}
    for replica in found["replicas"]:
        for rank in (replica["stats"] or {}).get("ranks", ()):
            rank["host"] = replica["host"]
    return found


def _fields(message: Wire) -> dict[str, Any]:
    return {name: _plain(getattr(message, name)) for name in message.__struct_fields__}


def _plain(value: Any) -> Any:
    kind = type(value)
    if kind is int or kind is str or kind is float:  # nearly all values
        return value
    if isinstance(value, Wire):
        return _fields(value)
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    if isinstance(value, Activity):
        return {"state": value.state.value, "level": value.level, "missing": list(value.missing)}
    return value
