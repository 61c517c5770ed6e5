"""POST /v1/admin/replicas: change the number of replicas while serving."""

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from shoal.errors import RequestError, UserError
from shoal.server.api import body_reader
from shoal.server.backend import Backend
from shoal.server.http.errors import error_responses
from shoal.server.operations.status import status_json

_MOST = 4096


class ReplicasWanted(BaseModel):
    replicas: int = Field(ge=1, le=_MOST, strict=True, description="the number of replicas to have")


def routes(llm: Backend) -> APIRouter:
    router = body_reader.router("admin")

    @router.post(
        "/v1/admin/replicas",
        summary="Set the number of replicas",
        description="Returns before added replicas are ready: see /v1/admin/status. Requests of replicas that are "
        "removed continue on the others.",
        response_class=JSONResponse,
        responses=error_responses(503),
    )
    async def scale(wanted: ReplicasWanted) -> Response:
        try:
            return JSONResponse(status_json(await llm.scale(wanted.replicas)))
        except UserError as error:
            raise RequestError(str(error), "replicas") from None

    return router
