"""Counts and durations of HTTP requests by path, method and status.

Each API server counts its own requests, and hands new counts to the process that has the fleet, which adds them up.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shoal.errors import ClosedError, ShoalError
from shoal.log import get_logger
from shoal.server.http.limits import route_of
from shoal.server.operations.metric_families import Histogram, MetricFamily

log = get_logger("server")

_BOUNDS_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 7.5, 10.0, 30.0),
    60.0,
)
_COARSE_S = (0.1, 0.5, 1.0)  # a subset of _BOUNDS_S
_METHODS = {"GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"}
_UNCOUNTED = {"/metrics", "/health", "/ready", "/version"}  # polled by machines
_PAUSE_S = 1.0  # between a request and handing its count over, at most

REQUESTS = MetricFamily(
    "http_requests_total", "counter", "HTTP requests, by path and status.", ("handler", "method", "status")
)
DURATION = MetricFamily(
    "http_request_duration_seconds",
    "histogram",
    "Time from the head of an HTTP request to the end of its answer, by path.",
    ("handler", "method"),
    _COARSE_S,
)
FINE_DURATION = MetricFamily(
    "http_request_duration_highr_seconds",
    "histogram",
    "Time from the head of an HTTP request to the end of its answer.",
    (),
    _BOUNDS_S,
)

Key = tuple[str, str, str]  # path of the route, method, class of the status ("2xx")


class HttpCounts:
    """Durations of HTTP requests, by path, method and status."""

    def __init__(self) -> None:
        self._durations: dict[Key, Histogram] = {}

    def add(self, handler: str, method: str, status: int, seconds: float) -> None:
        """Count a request. Unknown methods share one name, so that clients can't add ever more of them."""
        self._of((handler, method if method in _METHODS else "other", f"{status // 100}xx")).observe(seconds)

    def to_json(self) -> list[Any]:
        return [[*key, each.counts, each.total] for key, each in self._durations.items()]

    def take(self, counts: Sequence[Any]) -> None:
        """Add the counts that `to_json` of another object has returned."""
        for handler, method, status, buckets, total in counts:
            self._of((handler, method, status)).add(buckets, total)

    def take_over(self, payload: bytes) -> None:
        """Add the counts that `give` of another object has returned."""
        self.take(json.loads(payload) if payload else ())

    def give(self) -> bytes:
        """Return all counts, and forget them here."""
        payload = json.dumps(self.to_json()).encode() if self._durations else b""
        self._durations.clear()
        return payload

    def _of(self, key: Key) -> Histogram:
        found = self._durations.get(key)
        if found is None:
            found = self._durations[key] = Histogram(_BOUNDS_S)
        return found

    def requests(self) -> Iterator[tuple[Key, float]]:
        for key, each in sorted(self._durations.items()):
            yield key, sum(each.counts)

    def durations(self) -> Iterator[tuple[tuple[str, str], Histogram]]:
        """Yield the samples of `DURATION`."""
        found: dict[tuple[str, str], Histogram] = {}
        for (handler, method, _), each in sorted(self._durations.items()):
            found.setdefault((handler, method), Histogram(_COARSE_S)).add(_coarse(each.counts), each.total)
        yield from found.items()

    def all_durations(self) -> Histogram:
        """Return the histogram of `FINE_DURATION`."""
        found = Histogram(_BOUNDS_S)
        for each in self._durations.values():
            found.add(each.counts, each.total)
        return found


def _coarse(counts: list[int]) -> list[int]:
    found = Histogram(_COARSE_S)
    for bound, count in zip((*_BOUNDS_S, float("inf")), counts, strict=True):
        found.observe(bound, count)
    return found.counts


class HandOver:
    """The counts of one API server that the process with the fleet does not have yet; it gets them within a second."""

    def __init__(self, tell: Callable[[bytes], Awaitable[bytes]]) -> None:
        self._tell = tell
        self._counts = HttpCounts()
        self._due: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    def add(self, handler: str, method: str, status: int, seconds: float) -> None:
        self._counts.add(handler, method, status, seconds)
        if self._due is None:
            self._due = asyncio.get_running_loop().call_later(_PAUSE_S, self._start)

    def give(self) -> bytes:
        return self._counts.give()

    def take_back(self, payload: bytes) -> None:
        """Keep counts for later that `give` returned and that could not be handed over."""
        self._counts.take_over(payload)

    def _start(self) -> None:
        self._due = None
        self._task = asyncio.create_task(self._hand_over())

    async def _hand_over(self) -> None:
        payload = self.give()
        try:
            if payload:
                await self._tell(payload)
        except ClosedError:
            self.take_back(payload)
        except ShoalError:  # no answer in time: they may have arrived, and must not be counted twice
            log.warning("counts of HTTP requests may be lost: the fleet has not answered")


class CountRequests:
    """ASGI middleware that counts requests and measures their durations."""

    def __init__(self, app: ASGIApp, counts: HandOver) -> None:
        self._app = app
        self._counts = counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or route_of(scope) in _UNCOUNTED:
            await self._app(scope, receive, send)
            return
        status, begun = 500, time.monotonic()

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, note)
        finally:
            path = getattr(scope.get("route"), "path", "none")
            self._counts.add(path, scope["method"], status, time.monotonic() - begun)
