"""GET /debug/comm: what communication between ranks has cost, by replica and rank."""

import asyncio
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from pydantic_core import to_json

from shoal.llm.comm_profile import CommProfile, profile_replicas
from shoal.server.backend import Backend
from shoal.wire.fleet import FleetStatus, ReplicaStatus


def routes(llm: Backend) -> APIRouter:
    router = APIRouter(tags=["admin"])

    @router.get(
        "/debug/comm",
        summary="Time and bytes of the communication between ranks",
        description="Counts from the start of each rank's process; `replicas[].operations` includes earlier processes.",
        response_class=JSONResponse,
    )
    async def costs() -> Response:
        body = await asyncio.to_thread(_body, await llm.status())
        return Response(body, headers={"Cache-Control": "no-store"}, media_type="application/json")

    return router


def _body(status: FleetStatus) -> bytes:
    return to_json({"replicas": [_replica(replica) for replica in status.replicas]})


def _replica(replica: ReplicaStatus) -> dict[str, Any]:
    stats = replica.stats
    ranks = () if stats is None else stats.ranks
    return {
        "number": replica.number,
        "host": replica.host,
        **profile_replicas([] if stats is None else [stats]).as_json(),
        "ranks": [
            {
                "rank": rank.rank,
                "stage": rank.stage,
                "pid": rank.pid,
                **CommProfile.of(rank.traffic, rank.busy_us + rank.stage_wait_us, len(ranks)).as_json(),
            }
            for rank in ranks
        ],
    }
