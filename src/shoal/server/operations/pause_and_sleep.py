"""POST /pause, /resume, /sleep, /wake_up and /reset_prefix_cache, with vLLM's names and parameters.

Each applies to all replicas, and is answered when all of them have done it.
"""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Response
from fastapi.responses import JSONResponse

from shoal.activity import ActivityState
from shoal.errors import UserError
from shoal.server.backend import Backend
from shoal.server.http.errors import HttpError, error_responses
from shoal.wire.engine import reset_outcome_decoder
from shoal.wire.fleet import Operation

Mode = Literal["abort", "wait", "keep"]
_MODES = (
    "what happens to running requests: `abort` ends them, `wait` lets them finish first, `keep` suspends them until "
    "the server continues"
)


def routes(llm: Backend) -> APIRouter:
    router = APIRouter(tags=["admin"])
    _add_pauses(router, llm)
    _add_sleep(router, llm)

    @router.post(
        "/reset_prefix_cache",
        summary="Empty the prefix caches of all replicas",
        description="Running requests keep the blocks that they hold; new requests no longer find these.",
        response_class=JSONResponse,
        responses=error_responses(503),
    )
    async def reset_prefix_cache(
        reset_running_requests: Annotated[
            bool, Query(description="running requests compute their blocks again")
        ] = False,
        reset_external: Annotated[
            bool, Query(description="accepted for compatibility, without effect: there is no external cache")
        ] = False,
    ) -> Response:
        answer = await _operate(llm, Operation("reset_prefix_cache", running=reset_running_requests))
        found = reset_outcome_decoder.decode(answer)
        return _answer({"status": "reset", "forgotten_blocks": found.forgotten, "held_blocks": found.held})

    return router


def _add_pauses(router: APIRouter, llm: Backend) -> None:
    @router.post(
        "/pause",
        summary="Stop computing until /resume; new requests wait",
        response_class=JSONResponse,
        responses=error_responses(409, 503),
    )
    async def pause(
        mode: Annotated[Mode, Query(description=_MODES)] = "abort",
        wait_for_inflight_requests: Annotated[bool, Query(description="the same as mode=wait")] = False,
        clear_cache: Annotated[bool, Query(description="empty the prefix caches, unless requests are kept")] = True,
    ) -> Response:
        mode = "wait" if wait_for_inflight_requests and mode == "abort" else mode
        await _operate(llm, Operation("pause", mode=mode, clear_cache=clear_cache))
        return _answer({"status": "paused"})

    @router.post("/resume", summary="End a pause", response_class=JSONResponse, responses=error_responses(409, 503))
    async def resume() -> Response:
        await _operate(llm, Operation("resume"))
        return _answer({"status": "resumed"})

    @router.get(
        "/is_paused",
        summary="True while nothing is computed: paused or asleep",
        response_class=JSONResponse,
        responses=error_responses(503),
    )
    async def is_paused() -> Response:
        return _answer({"is_paused": (await llm.status()).activity != ActivityState.AWAKE})


def _add_sleep(router: APIRouter, llm: Backend) -> None:
    @router.post(
        "/sleep",
        summary="Free the memory of weights and KV caches; requests are refused until /wake_up",
        response_class=JSONResponse,
        responses=error_responses(409, 503),
    )
    async def sleep(
        level: Annotated[Literal["0", "1", "2"], Query(description="0 is a pause; 1 and 2 free the same memory")] = "1",
        mode: Annotated[Mode, Query(description=_MODES)] = "abort",
    ) -> Response:
        await _operate(llm, Operation("sleep", mode=mode, level=int(level)))
        return await _state(llm)

    @router.post(
        "/wake_up",
        summary="Allocate the memory and load the weights again, then continue",
        response_class=JSONResponse,
        responses=error_responses(409, 503),
    )
    async def wake_up(
        tags: Annotated[
            list[Literal["weights", "kv_cache", "scheduling"]] | None,
            Query(description="the parts to restore; all if none is given"),
        ] = None,
    ) -> Response:
        await _operate(llm, Operation("wake_up", tags=tuple(tags) if tags else None))
        return await _state(llm)

    @router.get(
        "/is_sleeping",
        summary="True while weights or KV caches are freed",
        response_class=JSONResponse,
        responses=error_responses(503),
    )
    async def is_sleeping() -> Response:
        return _answer({"is_sleeping": (await llm.status()).activity == ActivityState.ASLEEP})


async def _state(llm: Backend) -> Response:
    status = await llm.status()
    return _answer({"status": status.activity, "missing": list(status.missing)})


async def _operate(llm: Backend, wanted: Operation) -> bytes:
    """Have all replicas do something, and return their answer.

    Raises:
        HttpError: the replicas are in a state in which it can't be done, or the files of the weights have changed.
    """
    try:
        return await llm.operate(wanted)
    except UserError as error:
        raise HttpError(409, str(error)) from None


def _answer(body: dict[str, Any]) -> Response:
    return JSONResponse(body, headers={"Cache-Control": "no-store"})
