"""A small server with OpenAI's API on a separate thread, whose answers a test scripts."""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any

from aiohttp import web

MODEL = "fake"
Body = dict[str, Any]
Answer = Callable[[web.Request, Body], Awaitable[web.StreamResponse]]


class OpenAIServer:
    """A server whose tokens are characters. A prompt has one more token for its beginning.

    `answer` makes the answer to a request for text; `bodies` has the bodies of all requests.
    """

    def __init__(
        self,
        answer: Answer | None = None,
        *,
        key: str = "",
        tokenize: bool = True,
        models: bool = True,
        max_model_len: int = 100_000,
    ) -> None:
        self._answer = answer or answer_all
        self._key = key
        self._max_model_len = max_model_len
        self.bodies: list[Body] = []
        self.running = self.peak = 0
        app = web.Application(middlewares=[self._check_key])
        if models:
            app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._generate)
        app.router.add_post("/v1/chat/completions", self._generate)
        if tokenize:
            app.router.add_post("/tokenize", self._tokenize)
        self._app = app
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run)
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def texts(self) -> list[Body]:
        """The bodies without that of the first request, with which a client tries the server."""
        return self.bodies[1:]

    def __enter__(self) -> "OpenAIServer":
        self._thread.start()
        assert self._ready.wait(60)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(60)

    def _run(self) -> None:
        runner = web.AppRunner(self._app, handler_cancellation=True, shutdown_timeout=0.1)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self.port = runner.addresses[0][1]
        self._ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    @web.middleware
    async def _check_key(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if self._key and request.headers.get("Authorization") != f"Bearer {self._key}":
            return error(401, "a key is wanted")
        return await handler(request)

    async def _models(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"object": "list", "data": [{"id": MODEL, "max_model_len": self._max_model_len}]})

    async def _tokenize(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"count": len((await request.json())["prompt"]) + 1})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            return await self._answer(request, body)
        finally:
            self.running -= 1


def error(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"message": message, "type": "x", "code": status}}, status=status)


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def chunk(text: str, finish: str | None = None) -> bytes:
    return event({"choices": [{"index": 0, "text": text, "finish_reason": finish}]})


def usage(body: Body, tokens: int) -> bytes:
    prompt = len(body["prompt"] if "prompt" in body else body["messages"][0]["content"]) + 1
    return event({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": tokens}})


async def begin(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    return response


async def answer_all(request: web.Request, body: Body) -> web.StreamResponse:
    """Answer with as many tokens as are allowed, one per chunk."""
    response = await begin(request)
    count = body["max_tokens"]
    if "messages" in body:
        await response.write(event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}))
    for number in range(count):
        finish = "length" if number == count - 1 else None
        if "messages" in body:
            await response.write(event({"choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": finish}]}))
        else:
            await response.write(chunk("x", finish))
    await response.write(usage(body, count))
    await response.write(b"data: [DONE]\n\n")
    return response
