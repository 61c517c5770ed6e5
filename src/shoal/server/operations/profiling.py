"""POST /start_profile and /stop_profile, with vLLM's names: a trace of all replicas and requests."""

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from shoal.errors import UserError
from shoal.server.backend import Backend
from shoal.server.http.errors import HttpError, error_responses
from shoal.wire.trace import trace_summary_decoder


def routes(llm: Backend) -> APIRouter:
    router = APIRouter(tags=["admin"])

    @router.post(
        "/start_profile",
        summary="Begin to record a trace of all replicas and requests",
        description="The file is on the server's host; `--trace` says where. Refused if a trace is recorded already.",
        response_class=JSONResponse,
        responses=error_responses(409, 503),
    )
    async def start_profile() -> Response:
        await _ask(llm, "start_profile")
        return JSONResponse({"status": "recording"}, headers={"Cache-Control": "no-store"})

    @router.post(
        "/stop_profile",
        summary="End the trace; the answer names its file",
        description="Answered when the file is complete. Refused if no trace is recorded.",
        response_class=JSONResponse,
        responses=error_responses(409, 503),
    )
    async def stop_profile() -> Response:
        found = trace_summary_decoder.decode(await _ask(llm, "stop_profile", patient=True))
        body = {"status": "written", "file": found.file, "events": found.events, "note": found.note or None}
        return JSONResponse(body, headers={"Cache-Control": "no-store"})

    return router


async def _ask(llm: Backend, verb: str, *, patient: bool = False) -> bytes:
    """Ask the process that has the fleet.

    Raises:
        HttpError: a trace is recorded already, none is, or its file cannot be written.
    """
    try:
        return await llm.ask(verb, patient=patient)
    except UserError as error:
        raise HttpError(409, str(error)) from None
