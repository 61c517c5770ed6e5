"""Reading an answer as it streams in, and taking the time of its tokens."""

import json
from array import array
from typing import Any

from shoal.client.http import said


class BadStream(Exception):
    """What came is no answer; `kind` is a short name for reports."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Tally:
    """Takes in the bytes of server-sent events (WHATWG HTML, section 9.2), with the time at which they came.

    What came together has one time. An event counts as one with tokens if it has text, of whatever kind: the role at
    a chat's begin and the usage at the end are none.
    """

    __slots__ = ("_data", "_rest", "chunks", "finish_reason", "finished", "first", "gaps", "last", "output", "prompt")

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self.first: float | None = None
        self.last: float | None = None
        self.gaps = array("d")  # between events with tokens
        self.chunks = 0  # events with tokens
        self.prompt: int | None = None  # tokens, as the server counts them
        self.output: int | None = None
        self.finish_reason: str | None = None
        self.finished = False

    def feed(self, data: bytes, now: float) -> None:
        """Raises:
        BadStream: an event is an error, or is not what OpenAI's interface has.
        """
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line[5:])
            elif self._data and line in {b"", b"\r"}:
                payload = b"\n".join(self._data).strip()
                self._data.clear()
                self._event(payload, now)

    def close(self, now: float) -> None:
        """The stream has ended.

        Raises:
            BadStream: before its answer had.
        """
        if not self.finished:
            raise BadStream("broken stream", f"the stream ended after {self.chunks} chunks, without an end")
        if self.first is None and self.output:  # tokens without text, such as an end-of-text token alone
            self.first = self.last = now

    def _event(self, payload: bytes, now: float) -> None:
        if payload == b"[DONE]":
            self.finished = True
            return
        try:
            event = json.loads(payload)
            if event.get("error"):
                raise BadStream("error in stream", said(json.dumps(event)))
            if event.get("usage"):
                self.prompt = int(event["usage"]["prompt_tokens"])
                self.output = int(event["usage"].get("completion_tokens") or 0)
            choices = event.get("choices") or ()
            has_text = any(_has_text(choice) for choice in choices)
            for choice in choices:
                if choice.get("finish_reason"):
                    self.finish_reason = choice["finish_reason"]
                    self.finished = True
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
            raise BadStream("broken stream", f"this is no event: {payload[:80].decode(errors='replace')}") from None
        if has_text:
            self._tokens(now)

    def _tokens(self, now: float) -> None:
        if self.last is None:
            self.first = now
        else:
            self.gaps.append(now - self.last)
        self.last = now
        self.chunks += 1


def _has_text(choice: dict[str, Any]) -> bool:
    if choice.get("text"):
        return True
    delta: dict[str, Any] = choice.get("delta") or {}
    return any(value for name, value in delta.items() if name != "role")
