"""POST /pause, /resume, /sleep, /wake_up and /reset_prefix_cache, with vLLM's names.

Each is for all replicas, and is answered when all of them are done.
"""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Response
from fastapi.responses import JSONResponse

from shoal.activity import ActivityState
from shoal.errors import UserError
from shoal.server.backend import Backend
from shoal.server.http.errors import Refusal, documented
from shoal.wire.engine import cache_reset_decoder
from shoal.wire.fleet import Operation

Mode = Literal["abort", "wait", "keep"]
_MODES = (
    "what becomes of requests: `abort` ends them, with `wait` those that a replica has end first, with `keep` they "
    "stand still and go on later"
)


def routes(llm: Backend) -> APIRouter:
    router = APIRouter(tags=["admin"])
    _add_pauses(router, llm)
    _add_sleep(router, llm)

    @router.post(
        "/reset_prefix_cache",
        summary="Forget what the prefix caches of all replicas have",
        description="Requests that run keep the blocks they hold, which nobody else finds any more.",
        response_class=JSONResponse,
        responses=documented(503),
    )
    async def reset_prefix_cache(
        reset_running_requests: Annotated[
            bool, Query(description="requests that run compute theirs again, too")
        ] = False,
        reset_external: Annotated[bool, Query(description="there is no other cache: it says nothing")] = False,
    ) -> Response:
        told = await _operate(llm, Operation("reset_prefix_cache", running=reset_running_requests))
        found = cache_reset_decoder.decode(told)
        return _answer({"status": "reset", "forgotten_blocks": found.forgotten, "held_blocks": found.held})

    return router


def _add_pauses(router: APIRouter, llm: Backend) -> None:
    @router.post(
        "/pause",
        summary="Compute nothing until /resume; new requests wait",
        response_class=JSONResponse,
        responses=documented(409, 503),
    )
    async def pause(
        mode: Annotated[Mode, Query(description=_MODES)] = "abort",
        wait_for_inflight_requests: Annotated[bool, Query(description="the same as mode=wait")] = False,
        clear_cache: Annotated[bool, Query(description="forget prefixes, unless requests are kept")] = True,
    ) -> Response:
        mode = "wait" if wait_for_inflight_requests and mode == "abort" else mode
        await _operate(llm, Operation("pause", mode=mode, clear_cache=clear_cache))
        return _answer({"status": "paused"})

    @router.post("/resume", summary="End a pause", response_class=JSONResponse, responses=documented(409, 503))
    async def resume() -> Response:
        await _operate(llm, Operation("resume"))
        return _answer({"status": "resumed"})

    @router.get(
        "/is_paused",
        summary="Is nothing computed, be it paused or asleep?",
        response_class=JSONResponse,
        responses=documented(503),
    )
    async def is_paused() -> Response:
        return _answer({"is_paused": (await llm.status()).activity != ActivityState.AWAKE})


def _add_sleep(router: APIRouter, llm: Backend) -> None:
    @router.post(
        "/sleep",
        summary="Give the memory of weights and KV caches back; requests are refused until /wake_up",
        response_class=JSONResponse,
        responses=documented(409, 503),
    )
    async def sleep(
        level: Annotated[Literal["0", "1", "2"], Query(description="0 is a pause; 1 and 2 give back the same")] = "1",
        mode: Annotated[Mode, Query(description=_MODES)] = "abort",
    ) -> Response:
        await _operate(llm, Operation("sleep", mode=mode, level=int(level)))
        return await _state(llm)

    @router.post(
        "/wake_up",
        summary="Take the memory again, and go on once all of it is there",
        response_class=JSONResponse,
        responses=documented(409, 503),
    )
    async def wake_up(
        tags: Annotated[
            list[Literal["weights", "kv_cache", "scheduling"]] | None,
            Query(description="parts to take; all if none is given"),
        ] = None,
    ) -> Response:
        await _operate(llm, Operation("wake_up", tags=tuple(tags) if tags else None))
        return await _state(llm)

    @router.get(
        "/is_sleeping",
        summary="Were weights or KV caches given back?",
        response_class=JSONResponse,
        responses=documented(503),
    )
    async def is_sleeping() -> Response:
        return _answer({"is_sleeping": (await llm.status()).activity == ActivityState.ASLEEP})


async def _state(llm: Backend) -> Response:
    status = await llm.status()
    return _answer({"status": status.activity, "missing": list(status.missing)})


async def _operate(llm: Backend, wanted: Operation) -> bytes:
    """
    Raises:
        Refusal: it does not go with what the replicas are at, or with the files that are there.
    """
    try:
        return await llm.operate(wanted)
    except UserError as error:
        raise Refusal(409, str(error)) from None


def _answer(body: dict[str, Any]) -> Response:
    return JSONResponse(body, headers={"Cache-Control": "no-store"})
