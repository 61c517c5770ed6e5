"""POST /v1/admin/replicas: more or fewer replicas, while requests go on."""

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from shoal.errors import UserError
from shoal.server.api import bodies
from shoal.server.backend import Backend
from shoal.server.http.errors import Refusal, documented
from shoal.server.operations.status import status_json

_MOST = 4096


class ReplicasWanted(BaseModel):
    replicas: int = Field(ge=1, le=_MOST, strict=True, description="how many there shall be")


def routes(llm: Backend) -> APIRouter:
    router = bodies.router("admin")

    @router.post(
        "/v1/admin/replicas",
        summary="Have so many replicas from now on",
        description="Those that are added start at once, and are ready in their time: see /v1/admin/status. Requests "
        "of those that are taken out go on at the others.",
        response_class=JSONResponse,
        responses=documented(503),
    )
    async def scale(wanted: ReplicasWanted) -> Response:
        try:
            return JSONResponse(status_json(await llm.scale(wanted.replicas)))
        except UserError as error:
            raise Refusal(400, str(error), param="replicas") from None

    return router
