"""GET /health, /ready and /version, for load balancers and whoever starts servers."""

import asyncio
from typing import Protocol

from fastapi import APIRouter, Response

from shoal import __version__
from shoal.activity import ActivityState
from shoal.errors import ShoalError
from shoal.server.http.errors import Refusal, documented
from shoal.server.http.json_encoding import bytes_of
from shoal.wire.fleet import FleetStatus

_ANSWER_S = 5.0
_RETRY_S = 5.0
_MOST_NAMED = 8  # replicas in an answer


class HasHealth(Protocol):
    async def status(self) -> FleetStatus: ...

    async def ask(self, verb: str, payload: bytes = b"") -> bytes: ...


def routes(llm: HasHealth) -> APIRouter:
    router = APIRouter(tags=["health"])

    @router.get(
        "/health", summary="200 while requests can be served, else 503 with the cause", responses=documented(503)
    )
    async def health() -> Response:
        status = await _status(llm)
        if not status.accepting:
            raise _unavailable(_why_not_accepting(status))
        if not any(replica.state == "ready" for replica in status.replicas):
            raise _unavailable(f"no replica is ready: {_states(status, local_only=False)}")
        # Whoever is paused or asleep is well: nobody should start it anew for that.
        return _answer({"status": "ok" if status.activity == ActivityState.AWAKE else status.activity})

    @router.get(
        "/ready",
        summary="200 once all replicas of this host are up, and none drains, is paused or asleep",
        responses=documented(503),
    )
    async def ready() -> Response:
        status = await _status(llm)
        if not status.accepting:
            raise _unavailable(_why_not_accepting(status))
        if status.activity != ActivityState.AWAKE:
            raise _unavailable(_why_not_awake(status))
        if not await _asked(llm):
            raise _unavailable(f"not all replicas are ready: {_states(status, local_only=True)}")
        return _answer({"status": "ready"})

    @router.get("/version", summary="The server's version")
    async def version() -> Response:
        return _answer({"version": __version__})

    return router


async def _status(llm: HasHealth) -> FleetStatus:
    try:
        async with asyncio.timeout(_ANSWER_S):
            return await llm.status()
    except (ShoalError, TimeoutError) as error:
        raise _unanswered(error) from None


async def _asked(llm: HasHealth) -> bool:
    """Are all replicas of this host up?"""
    try:
        async with asyncio.timeout(_ANSWER_S):
            return bool(await llm.ask("started"))
    except (ShoalError, TimeoutError) as error:
        raise _unanswered(error) from None


def _unanswered(error: Exception) -> Refusal:
    return _unavailable(str(error) or f"the engine has not answered within {_ANSWER_S:g} s")


def _why_not_accepting(status: FleetStatus) -> str:
    return status.failure or "the server is about to end and takes no new requests"


def _why_not_awake(status: FleetStatus) -> str:
    if status.activity == ActivityState.PAUSED:
        return "the server is paused: POST /resume lets it go on"
    return f"the server is asleep, without {' and '.join(status.missing)}: POST /wake_up wakes it up"


def _states(status: FleetStatus, *, local_only: bool) -> str:
    """Those that are not ready, and what ended them."""
    missing = [
        replica
        for replica in status.replicas
        if replica.state != "ready" and not (local_only and replica.state == "awaited")
    ]
    named = [
        f"replica {replica.number} is {replica.state} for {replica.since_s:.0f} s"
        + (f" ({replica.cause})" if replica.cause else "")
        for replica in missing[:_MOST_NAMED]
    ]
    if len(missing) > _MOST_NAMED:
        named.append(f"{len(missing) - _MOST_NAMED} more")
    return "; ".join(named) or "there is none"


def _unavailable(why: str) -> Refusal:
    return Refusal(503, why, retry_after=_RETRY_S)


def _answer(body: dict[str, str]) -> Response:
    return Response(bytes_of(body), media_type="application/json", headers={"Cache-Control": "no-store"})
