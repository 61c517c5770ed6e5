"""/v1/models: what is served."""

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from shoal.server.api.schemas import Model, ModelList
from shoal.server.api.start_requests import Service, answer_of
from shoal.server.http.errors import documented


def routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["OpenAI"])

    @router.get("/v1/models", responses={200: {"model": ModelList}, **documented()}, response_class=Response)
    async def list_models() -> Response:
        """The names that the model is served under."""
        return answer_of({"object": "list", "data": [_model(service, name) for name in service.names]})

    @router.get("/v1/models/{name:path}", responses={200: {"model": Model}, **documented(404)}, response_class=Response)
    async def retrieve_model(name: str) -> Response:
        return answer_of(_model(service, service.model(name)))

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
