"""/v1/responses/{id}: what was stored of a response, for those who come back to it."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query
from starlette.responses import Response

from shoal.server.api.response_store import Shelf
from shoal.server.api.schemas import Deleted, InputItems, ResponsesAnswer
from shoal.server.api.start_requests import Service, answer_of
from shoal.server.http.errors import Refusal, documented
from shoal.values import shown

_PATH = "/v1/responses/{response_id}"
Name = Annotated[str, Path(max_length=256)]
Limit = Annotated[int, Query(ge=1, le=100)]


def routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["OpenAI"])
    shelf = Shelf(service.llm, service.settings)

    @router.get(_PATH, responses={200: {"model": ResponsesAnswer}, **documented(404, 503)}, response_class=Response)
    async def retrieve_response(response_id: Name, stream: bool = False) -> Response:
        """A stored response."""
        if stream:
            why = "a stored response can't be streamed: leave stream out, and it comes as a whole"
            raise Refusal(400, why, param="stream")
        return Response(await _stored(shelf, response_id), media_type="application/json")

    @router.delete(_PATH, responses={200: {"model": Deleted}, **documented(404, 503)}, response_class=Response)
    async def delete_response(response_id: Name) -> Response:
        """Forgets a response. Others that went on from it keep their conversations."""
        if not await shelf.drop(response_id):
            raise shelf.missing(response_id, "response_id")
        return answer_of({"id": response_id, "object": "response", "deleted": True})

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
        """The items that a response answers, what came before included."""
        turns = await shelf.conversation(response_id)
        if turns is None:
            raise shelf.missing(response_id, "response_id")
        items = [item for turn in turns[:-1] for item in turn]
        return answer_of(_page(items if order == "asc" else items[::-1], limit, after, before))

    @router.post(f"{_PATH}/cancel", responses=documented(404, 503), response_class=Response)
    async def cancel_response(response_id: Name) -> Response:
        """Refuses: a stored response has ended."""
        await _stored(shelf, response_id)
        why = (
            "only a response that runs in the background can be cancelled, and there are none here: this one has ended"
        )
        raise Refusal(400, f"{why}; close the connection to end one that is being made", param="response_id")

    return router


async def _stored(shelf: Shelf, name: str) -> bytes:
    found = await shelf.read(name)
    if found is None:
        raise shelf.missing(name, "response_id")
    return found


def _page(items: Sequence[Any], limit: int, after: str | None, before: str | None) -> dict[str, Any]:
    """The items behind `after` and before `before`, as many as `limit` allows."""
    names = [item.get("id") for item in items]
    start = 0 if after is None else _place(names, after, "after") + 1
    end = len(items) if before is None else _place(names, before, "before")
    found = items[start : min(end, start + limit)]
    return {
        "object": "list",
        "data": found,
        "first_id": found[0].get("id") if found else None,
        "last_id": found[-1].get("id") if found else None,
        "has_more": start + limit < end,
    }


def _place(names: Sequence[Any], name: str, param: str) -> int:
    if name not in names:
        raise Refusal(400, f"{param} must be the id of one of the items, got {shown(name)}", param=param)
    return names.index(name)
