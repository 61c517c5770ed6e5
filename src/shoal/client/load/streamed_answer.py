"""Reading an answer as it streams in, and measuring the times of its tokens."""

import json
from array import array
from typing import Any

from shoal.client.http import error_message

_BROKEN_OFF = {"abort", "error"}  # finish reasons of dropped requests; OpenAI does not have them, but engines do


class BrokenAnswer(Exception):
    """The server sent something that is not a complete answer. `kind` is a short name for reports."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class StreamedAnswer:
    """An answer of server-sent events (WHATWG HTML, section 9.2), with the times at which its bytes came.

    Bytes that came together have one time. An event counts as a chunk if it has text of any kind; the role at the
    beginning of a chat and the usage at its end do not count.
    """

    __slots__ = (
        "_answered", "_data", "_rest", "chunks", "finish_reason", "finished", "first", "gaps", "last", "output_tokens",
        "prompt_tokens", "stopped",
    )  # fmt: skip

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self.first: float | None = None
        self.last: float | None = None
        self.stopped: float | None = None  # when the finish reason came, after tokens without text
        self.gaps = array("d")  # seconds between chunks
        self.chunks = 0
        self.prompt_tokens: int | None = None  # as the server counts them
        self.output_tokens: int | None = None
        self.finish_reason: str | None = None
        self.finished = False
        self._answered = False

    def feed(self, data: bytes, now: float) -> None:
        """Take in the next bytes.

        Raises:
            BrokenAnswer: an event is an error, or does not have the form of OpenAI's API.
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
        """Take in the end of the stream.

        Raises:
            BrokenAnswer: the answer is not complete.
        """
        if not self.finished or not self._answered:
            raise BrokenAnswer("broken stream", f"the stream ended after {self.chunks} chunks, before the answer")
        if self.finish_reason in _BROKEN_OFF:
            raise BrokenAnswer("broken off", f"the server ended it after {self.chunks} chunks: {self.finish_reason}")
        if self.first is None and self.output_tokens:  # tokens without text, such as an end-of-text token alone
            self.first = self.last = now

    def _event(self, payload: bytes, now: float) -> None:
        if payload == b"[DONE]":
            self.finished = True
            return
        try:
            event = json.loads(payload)
            if event.get("error"):
                raise BrokenAnswer("error in stream", error_message(json.dumps(event)))
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
            raise BrokenAnswer(
                "broken stream", f"not an event of the API: {payload[:80].decode(errors='replace')}"
            ) from None
        if has_text:
            self._add_chunk(now)

    def _count(self, usage: dict[str, Any]) -> None:
        """Take in the counts of tokens. One of them may be missing or null, but not both."""
        prompt, output = usage.get("prompt_tokens"), usage.get("completion_tokens")
        if prompt is None and output is None:
            raise KeyError("completion_tokens")
        self.prompt_tokens = self.prompt_tokens if prompt is None else int(prompt)
        self.output_tokens = self.output_tokens if output is None else int(output)

    def _add_chunk(self, now: float) -> None:
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
