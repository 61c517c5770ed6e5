"""Reading an answer as it streams in, and taking the time of its tokens."""

import json
from array import array
from typing import Any

from shoal.client.http import said

_BROKEN_OFF = {"abort", "error"}  # not OpenAI's, but what engines say of what they have dropped


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

    __slots__ = (
        "_answered", "_data", "_rest", "chunks", "finish_reason", "finished", "first", "gaps", "last", "output",
        "prompt", "stopped",
    )  # fmt: skip

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self.first: float | None = None
        self.last: float | None = None
        self.stopped: float | None = None  # when the end was told: tokens without text came by then
        self.gaps = array("d")  # between events with tokens
        self.chunks = 0  # events with tokens
        self.prompt: int | None = None  # tokens, as the server counts them
        self.output: int | None = None
        self.finish_reason: str | None = None
        self.finished = False
        self._answered = False

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
        if not self.finished or not self._answered:
            raise BadStream("broken stream", f"the stream ended after {self.chunks} chunks, without an end")
        if self.finish_reason in _BROKEN_OFF:
            raise BadStream("broken off", f"the server ended it after {self.chunks} chunks: {self.finish_reason}")
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
                self._count(event["usage"])
            choices = event.get("choices") or ()
            has_text = any(_has_text(choice) for choice in choices)
            for choice in choices:
                self._answered = True
                if choice.get("finish_reason"):
                    self.finish_reason = choice["finish_reason"]
                    self.finished = True
                    self.stopped = now
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
            raise BadStream("broken stream", f"this is no event: {payload[:80].decode(errors='replace')}") from None
        if has_text:
            self._tokens(now)

    def _count(self, usage: dict[str, Any]) -> None:
        """Either of the counts may be missing or null, but not both."""
        prompt, output = usage.get("prompt_tokens"), usage.get("completion_tokens")
        if prompt is None and output is None:
            raise KeyError("completion_tokens")
        self.prompt = self.prompt if prompt is None else int(prompt)
        self.output = self.output if output is None else int(output)

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
