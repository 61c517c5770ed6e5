"""The items of a response's output as they grow, and the events that tell of it.

The shapes are those of OpenAI's API reference, "Responses" and "Streaming events".
"""

from collections.abc import Mapping, Sequence
from typing import Any

from shoal.openai.answers import chat_logprobs
from shoal.server.api.start_requests import identifier
from shoal.server.http.json_encoding import EncodedList
from shoal.server.tools.choice import CallDeltas, ToolPlan


class OutputItems:
    """The items of an output as they grow. What is done to them is given as events."""

    def __init__(self, plan: ToolPlan, top: int | None, *, whole: bool) -> None:
        """`top`: how many of the likeliest tokens are told, where log-probabilities are; `whole`: as `CallDeltas`."""
        self.items: list[dict[str, Any]] = []
        self.written = 0  # tokens
        self._reader = CallDeltas(plan, whole=whole) if plan.parser is not None else None
        self._top = top or 0
        self._open = False  # the last item may grow
        self._known = EncodedList()  # of tokens whose text is not certain yet

    def feed(self, text: str, tokens: Sequence[int], logprobs: Any, finish: str | None) -> list[dict[str, Any]]:
        self.written += len(tokens)
        events: list[dict[str, Any]] = []
        known = EncodedList()
        if logprobs is not None:
            chat_logprobs(tokens, logprobs, self._top, known)
        if self._reader is None:
            return self._text(text, known) if text or known else events
        self._known += known
        for delta in self._reader.feed(text, finish):
            if "content" in delta:
                known, self._known = self._known, EncodedList()
                events += self._text(delta["content"], known)
            for part in delta.get("tool_calls", ()):
                events += self._call(part)
        return events

    def end(self, reason: str | None) -> list[dict[str, Any]]:
        begun = [] if self.items else self._text("", EncodedList())
        cut = reason == "length" or (self._reader is not None and self._reader.cut)
        return begun + self._close("incomplete" if cut else "completed")

    def _text(self, text: str, logprobs: EncodedList) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        if not self._open or self.items[-1]["type"] != "message":
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": EncodedList()}
            item = {"type": "message", "id": identifier("msg"), "role": "assistant", "content": []}
            events = self._begin(item)
            self.items[-1]["content"] = [part]
            events.append(self._event("response.content_part.added", content_index=0, part={**part, "logprobs": []}))
        (part,) = self.items[-1]["content"]
        part["text"] += text
        part["logprobs"] += logprobs
        delta = self._event("response.output_text.delta", content_index=0, delta=text, logprobs=logprobs)
        return [*events, delta]

    def _call(self, part: Mapping[str, Any]) -> list[dict[str, Any]]:
        function = part["function"]
        if "id" in part:
            names = {"call_id": part["id"], "name": function["name"], "arguments": ""}
            return self._begin({"type": "function_call", "id": identifier("fc"), **names})
        self.items[-1]["arguments"] += function["arguments"]
        return [self._event("response.function_call_arguments.delta", delta=function["arguments"])]

    def _begin(self, item: dict[str, Any]) -> list[dict[str, Any]]:
        closed = self._close("completed")
        self.items.append({**item, "status": "in_progress"})
        self._open = True
        return [*closed, self._item_event("response.output_item.added")]

    def _close(self, status: str) -> list[dict[str, Any]]:
        if not self._open:
            return []
        self._open = False
        item = self.items[-1]
        item["status"] = status
        if item["type"] == "message":
            (part,) = item["content"]
            text = {"text": part["text"], "logprobs": part["logprobs"]}
            events = [
                self._event("response.output_text.done", content_index=0, **text),
                self._event("response.content_part.done", content_index=0, part=dict(part)),
            ]
        else:
            arguments = {"name": item["name"], "arguments": item["arguments"]}
            events = [self._event("response.function_call_arguments.done", **arguments)]
        return [*events, self._item_event("response.output_item.done")]

    def _event(self, kind: str, **more: Any) -> dict[str, Any]:
        return {"type": kind, "item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, **more}

    def _item_event(self, kind: str) -> dict[str, Any]:
        return {"type": kind, "output_index": len(self.items) - 1, "item": dict(self.items[-1])}
