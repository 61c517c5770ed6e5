"""uvicorn's HTTP/1.1, with limits on what a connection may send, how long it may take, and what it may leave unread.

uvicorn limits neither the size of a request's headers nor the time until they have arrived, and never gives up on a
client that stops reading. It treats an offer of another protocol as accepted, and answers HTTP/1.0 as if it were 1.1.
The parser is httptools (llhttp): a request costs the server 35 us and a streamed chunk 4 us; with h11 it would be 150
and 8. The code here adds some 10 us to a request, and nothing to a chunk.
"""

import asyncio
import dataclasses
from itertools import chain
from typing import Any, ClassVar, NoReturn

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from shoal.process import open_files
from shoal.server.http import http10
from shoal.server.http.errors import HttpError
from shoal.server.http.limits import RequestLimits
from shoal.server.http.upgrades import RequestParser

_LOOK_S = 5.0  # how often a connection that must send something compares its deadline with the clock
_GRACE_S = 5.0  # in which the application may answer a late body itself
_OTHER_FILES = 512  # file descriptors that the process needs beside its connections


class BoundedProtocol(HttpToolsProtocol):
    """A connection of a client. All connections of one class share its `limits`: see `protocol_with`."""

    limits: ClassVar[RequestLimits]
    idle: ClassVar["dict[BoundedProtocol, None]"]  # connections between two requests, the most recently used one last
    fresh: ClassVar["dict[BoundedProtocol, None]"]  # connections that have sent nothing, the newest last

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.parser = RequestParser(self)
        self._in_head = False
        self._in_body = False
        self._head_bytes = 0  # of the first line, names and values so far
        self._head_fed = 0  # bytes given to the parser since the head began; it may hold them without a callback
        self._messages = 0
        self._discarded = 0
        self._why = HttpError(400, "this is not HTTP/1.1")  # what the client is told if the parser can't go on
        self._refused = False  # the client was refused; nothing is read any more
        self._running: RequestResponseCycle | None = None
        self._deadline: float | None = None  # until which the client must send what is expected
        self._timer: asyncio.TimerHandle | None = None
        self._stuck: asyncio.TimerHandle | None = None

    # --- the connection ------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections and not self._close_oldest():
            self._refuse(HttpError(503, f"{self.limits.connections} connections are open: try again", retry_after=1.0))
            return
        self.fresh[self] = None
        self._expect(self.limits.header_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave_idle()
        self._deadline = None
        for timer in (self._timer, self._stuck):
            if timer is not None:
                timer.cancel()
        waiting = [cycle for cycle, _ in self.pipeline]
        self.pipeline.clear()
        super().connection_lost(exc)
        for cycle in filter(None, (self._running, *waiting)):  # uvicorn tells only the last one
            cycle.disconnected = True
            cycle.message_event.set()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._leave_idle()
        if self._deadline is None and self._answered:
            self._expect(self.limits.header_s)
        message = self._messages if self._in_head else None
        super().data_received(data)
        if self._in_head and message == self._messages and not self._refused:
            self._head_fed += len(data)
            if self._head_fed > self.limits.header_bytes:
                self._refuse(self._too_much())

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        old = cycle.scope["http_version"] in http10.VERSIONS
        http10_or_11: Any = http10.Http10(app, cycle) if old else app
        super()._start_asgi_task(cycle, http10_or_11)

    # --- what the parser finds -----------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._messages += 1
        self._head_bytes = self._head_fed = self._discarded = 0
        self._expect(self.limits.header_s)

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Note a header, or a field of a chunked body's trailer."""
        super().on_header(name, value)
        self._count(len(name) + len(value) + len(": \r\n"))

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > self.limits.header_bytes or len(self.headers) > self.limits.headers:
            self._stop(self._too_much())

    def _stop(self, why: HttpError) -> NoReturn:
        """Refuse the request from within a callback of the parser, which then gives up on the connection."""
        self._why = why
        raise why

    def _too_much(self) -> HttpError:
        most = self.limits
        return HttpError(
            431, f"a request may have at most {most.headers} headers, of {most.header_bytes} bytes together: send fewer"
        )

    def on_headers_complete(self) -> None:
        if self.parser.get_method() == b"CONNECT":
            self._stop(HttpError(405, "this server is not a proxy: CONNECT is not allowed"))
        if self.parser.should_upgrade():
            return
        self._in_head = False
        if len(self.pipeline) >= self.limits.pipelined:
            self._stop(
                HttpError(
                    429, f"more than {self.limits.pipelined} requests wait on one connection: open more connections"
                )
            )
        super().on_headers_complete()
        self.cycle.keep_alive = self.parser.should_keep_alive()  # of HTTP/1.0 too
        self._in_body = True
        self._expect(self.limits.body_s + _GRACE_S)

    def read_again(self) -> RequestParser:
        line = b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        headers = [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        self.parser = RequestParser(self)
        self.parser.feed_data(b"\r\n".join([line, *headers, b"", b""]))
        return self.parser

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        if self.cycle.response_complete:
            self._discarded += len(body)
            if self._discarded > self.limits.discarded_bytes:
                self.transport.close()

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        super().on_message_complete()
        self._in_body = False
        self._deadline = None
        if self._answered:  # the body has not been read
            self._become_idle(self.timeout_keep_alive)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._answered and not self._in_body and not self._in_head and not self.transport.is_closing():
            self._become_idle()

    @property
    def _answered(self) -> bool:
        """True if every request that came has its whole answer."""
        return not self.pipeline and (self.cycle is None or self.cycle.response_complete)

    # --- the clock -----------------------------------------------------------------------------------------------

    def _become_idle(self, seconds: float | None = None) -> None:
        """Note that the connection has no request now.

        Args:
            seconds: the time after which it is closed; None: uvicorn's own timer closes it.
        """
        self.idle[self] = None
        if len(self.idle) > self.limits.idle_connections:
            self._close_oldest()
        if seconds is not None:
            self._expect(seconds)

    def _leave_idle(self) -> None:
        self.idle.pop(self, None)
        self.fresh.pop(self, None)

    def _close_oldest(self) -> bool:
        """Close the connection that has been idle longest, or else the oldest one that never sent anything.

        Returns:
            False if there is no such connection.
        """
        oldest = next((each for each in chain(self.idle, self.fresh) if each is not self), None)
        if oldest is None:
            return False
        oldest._leave_idle()
        oldest.transport.close()
        return True

    def _expect(self, seconds: float) -> None:
        """Set the deadline for what the client must send.

        One timer serves many requests: it compares the deadline with the clock when it fires.
        """
        self._deadline = self.loop.time() + seconds
        if self._timer is None:
            self._timer = self.loop.call_later(min(seconds, _LOOK_S), self._look)

    def _look(self) -> None:
        self._timer = None
        if self._deadline is None or self.transport.is_closing():
            return
        left = self._deadline - self.loop.time()
        if left > 0:
            self._timer = self.loop.call_later(min(left, _LOOK_S), self._look)
        elif self._in_head:
            self._refuse(HttpError(408, f"the headers did not arrive within {self.limits.header_s:g} s"))
        else:
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stuck is None:
            self._stuck = self.loop.call_later(self.limits.write_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None

    # --- refusals ------------------------------------------------------------------------------------------------

    def send_400_response(self, msg: str) -> None:
        """Answer a request that the parser can't read."""
        self._refuse(self._why)

    def _refuse(self, refused: HttpError) -> None:
        """Answer with an error and read nothing more.

        For a while, everything that still comes is thrown away: if the connection were closed with unread bytes, it
        would be reset, and the client would not see the answer.
        """
        self._refused = True
        self._deadline = None
        self._leave_idle()
        cycle = self.cycle
        begun = cycle is not None and not cycle.response_complete and (cycle.response_started or self.pipeline)
        if cycle is not None:
            cycle.disconnected = True
            cycle.message_event.set()
        if begun:  # in the middle of another answer there is no place for an error
            self.transport.close()
            return
        self.transport.write(_answer(refused))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(self.limits.linger_s, self.transport.close)


def protocol_with(limits: RequestLimits) -> type[BoundedProtocol]:
    """Return a class for `uvicorn.Config(http=...)`.

    It accepts no more connections than the process may have open files.
    """
    files = open_files.raise_limit()
    room = max(files - _OTHER_FILES, files // 2)
    limits = dataclasses.replace(limits, connections=min(limits.connections, room))
    return type("Protocol", (BoundedProtocol,), {"limits": limits, "idle": {}, "fresh": {}})


def _answer(refused: HttpError) -> bytes:
    response = refused.response({"connection": "close"})
    lines = [b"%s: %s\r\n" % header for header in response.raw_headers]
    return b"".join([STATUS_LINE[refused.status], *lines, b"\r\n", bytes(response.body)])
