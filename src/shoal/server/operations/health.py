"""GET /health, /ready and /version, for load balancers and for programs that start servers."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from fastapi import APIRouter, Response

from shoal import __version__
from shoal.activity import ActivityState
from shoal.errors import ShoalError
from shoal.server.backend import Backend
from shoal.server.http.errors import HttpError, error_responses
from shoal.server.http.json_encoding import json_bytes
from shoal.wire.fleet import FleetStatus

T = TypeVar("T")

_RETRY_S = 5.0
_MOST_NAMED = 8  # replicas that an error names


def routes(llm: Backend, *, answer_s: float = 5.0) -> APIRouter:
    """Endpoints over `llm`, which has `answer_s` seconds to answer them."""
    router = APIRouter(tags=["health"])

    @router.get(
        "/health", summary="200 while requests can be served, else 503 with the cause", responses=error_responses(503)
    )
    async def health() -> Response:
        status = await _answered(llm.status(), answer_s)
        if not status.accepting:
            raise _unavailable(_why_not_accepting(status))
        if not any(replica.state == "ready" for replica in status.replicas):
            raise _unavailable(f"no replica is ready: {_states(status, local_only=False)}")
        if why := _why_none_computes(status):
            raise _unavailable(why)
        # A paused or sleeping server is healthy: it must not be restarted for that.
        return _answer({"status": "ok" if status.activity == ActivityState.AWAKE else status.activity})

    @router.get(
        "/ready",
        summary="200 once all replicas of this host are ready and the server is neither draining, paused nor asleep",
        responses=error_responses(503),
    )
    async def ready() -> Response:
        status = await _answered(llm.status(), answer_s)
        if not status.accepting:
            raise _unavailable(_why_not_accepting(status))
        if status.activity != ActivityState.AWAKE:
            raise _unavailable(_why_not_awake(status))
        if not await _answered(llm.ask("started"), answer_s):
            raise _unavailable(f"not all replicas are ready: {_states(status, local_only=True)}")
        return _answer({"status": "ready"})

    @router.get("/version", summary="The server's version")
    async def version() -> Response:
        return _answer({"version": __version__})

    return router


async def _answered(question: Awaitable[T], answer_s: float) -> T:
    try:
        async with asyncio.timeout(answer_s):
            return await question
    except (ShoalError, TimeoutError) as error:
        raise _unavailable(str(error) or f"the fleet has not answered within {answer_s:g} s") from None


def _why_not_accepting(status: FleetStatus) -> str:
    return status.failure or "the server is shutting down and takes no new requests"


def _why_none_computes(status: FleetStatus) -> str:
    """Return why no replica that is ready computes at present, because ranks are replaced; "" if one does."""
    troubles = [
        f"replica {replica.number}: {replica.stats.trouble}" if replica.stats and replica.stats.trouble else ""
        for replica in status.replicas
        if replica.state == "ready"
    ]
    return "; ".join(troubles[:_MOST_NAMED]) if all(troubles) else ""


def _why_not_awake(status: FleetStatus) -> str:
    if status.activity == ActivityState.PAUSED:
        return "the server is paused: POST /resume continues"
    return f"the server is asleep, without {' and '.join(status.missing)}: POST /wake_up wakes it up"


def _states(status: FleetStatus, *, local_only: bool) -> str:
    """Return the replicas that are not ready, and why, as text."""
    missing = [
        replica
        for replica in status.replicas
        if replica.state != "ready" and not (local_only and replica.state == "awaited")
    ]
    named = [
        f"replica {replica.number}: {replica.state} for {replica.since_s:.0f} s"
        + (f" ({replica.cause})" if replica.cause else "")
        for replica in missing[:_MOST_NAMED]
    ]
    if len(missing) > _MOST_NAMED:
        named.append(f"{len(missing) - _MOST_NAMED} more")
    return "; ".join(named) or "there are no replicas"


def _unavailable(why: str) -> HttpError:
    return HttpError(503, why, retry_after=_RETRY_S)


def _answer(body: dict[str, str]) -> Response:
    return Response(json_bytes(body), media_type="application/json", headers={"Cache-Control": "no-store"})
