"""The endpoint /v1/models: the names of the served model."""

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from shoal.server.api.answer_schemas import Model, ModelList
from shoal.server.api.service import Service, json_response
from shoal.server.http.errors import documented


def routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["OpenAI"])

    @router.get("/v1/models", responses={200: {"model": ModelList}, **documented()}, response_class=Response)
    async def list_models() -> Response:
        """List the names of the served model."""
        return json_response({"object": "list", "data": [_model(service, name) for name in service.names]})

    @router.get("/v1/models/{name:path}", responses={200: {"model": Model}, **documented(404)}, response_class=Response)
    async def retrieve_model(name: str) -> Response:
        """Return the model of this name."""
        return json_response(_model(service, service.model(name)))

    return router


def _model(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.started,
        "owned_by": "shoal",
        "root": service.llm.model_name,
        "max_model_len": service.llm.max_model_len,
    }
