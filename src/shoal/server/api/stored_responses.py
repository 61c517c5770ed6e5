"""The endpoints under /v1/responses/{id}: stored responses, for clients that come back to them."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query
from starlette.responses import Response

from shoal.errors import RequestError
from shoal.server.api.answer_schemas import Deleted, InputItems, ResponsesAnswer
from shoal.server.api.service import Service, json_response
from shoal.server.api.stored_conversations import StoredConversations
from shoal.server.http.errors import documented
from shoal.values import shown

_PATH = "/v1/responses/{response_id}"
Name = Annotated[str, Path(max_length=256)]
Limit = Annotated[int, Query(ge=1, le=100)]


def routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["OpenAI"])
    stored = StoredConversations(service.llm, service.settings)

    @router.get(_PATH, responses={200: {"model": ResponsesAnswer}, **documented(404, 503)}, response_class=Response)
    async def retrieve_response(response_id: Name, stream: bool = False) -> Response:
        """Return a stored response."""
        if stream:
            why = "a stored response can't be streamed: leave stream out to get it as a whole"
            raise RequestError(why, "stream")
        return Response(await _read_stored(stored, response_id), media_type="application/json")

    @router.delete(_PATH, responses={200: {"model": Deleted}, **documented(404, 503)}, response_class=Response)
    async def delete_response(response_id: Name) -> Response:
        """Delete a response. Others that continued it keep their conversations."""
        if not await stored.drop(response_id):
            raise stored.missing(response_id, "response_id")
        return json_response({"id": response_id, "object": "response", "deleted": True})

    @router.get(
        f"{_PATH}/input_items",
        responses={200: {"model": InputItems}, **documented(404, 503)},
        response_class=Response,
    )
    async def list_input_items(
        response_id: Name,
        limit: Limit = 20,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
        before: str | None = None,
    ) -> Response:
        """List the items that a response answers, those of earlier turns included."""
        turns = await stored.conversation(response_id)
        if turns is None:
            raise stored.missing(response_id, "response_id")
        items = [item for turn in turns[:-1] for item in turn]
        return json_response(_page(items if order == "asc" else items[::-1], limit, after, before))

    @router.post(f"{_PATH}/cancel", responses=documented(404, 503), response_class=Response)
    async def cancel_response(response_id: Name) -> Response:
        """Refuse: a stored response has ended."""
        await _read_stored(stored, response_id)
        why = (
            "only a response that runs in the background can be cancelled, and there are none here: this one has ended"
        )
        raise RequestError(f"{why}; close the connection to end one that is being made", "response_id")

    return router


async def _read_stored(stored: StoredConversations, name: str) -> bytes:
    found = await stored.read(name)
    if found is None:
        raise stored.missing(name, "response_id")
    return found


def _page(items: Sequence[Any], limit: int, after: str | None, before: str | None) -> dict[str, Any]:
    """Return the items after `after` and before `before`, at most `limit` of them."""
    names = [item.get("id") for item in items]
    start = 0 if after is None else _position(names, after, "after") + 1
    end = len(items) if before is None else _position(names, before, "before")
    found = items[start : min(end, start + limit)]
    return {
        "object": "list",
        "data": found,
        "first_id": found[0].get("id") if found else None,
        "last_id": found[-1].get("id") if found else None,
        "has_more": start + limit < end,
    }


def _position(names: Sequence[Any], name: str, param: str) -> int:
    if name not in names:
        raise RequestError.about(param, f"must be the id of one of the items, got {shown(name)}")
    return names.index(name)
