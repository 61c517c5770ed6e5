"""The output items of a response while they grow, and the events of a stream that describe it.

The shapes are those of OpenAI's API reference, "Responses" and "Streaming events".
"""

from collections.abc import Mapping, Sequence
from typing import Any

from shoal.openai.answers import chat_logprobs
from shoal.openai.tools.call_deltas import CallDeltas
from shoal.openai.tools.tool_plan import ToolPlan
from shoal.server.api.service import new_id
from shoal.server.http.json_encoding import EncodedList


class OutputItems:
    """The items of one output while it grows. The methods return the events that describe each change.

    Args:
        top: the number of likeliest tokens at each position, if log-probabilities were asked for.
        whole: as for `CallDeltas`.
    """

    def __init__(self, plan: ToolPlan, top: int | None, *, whole: bool) -> None:
        self.items: list[dict[str, Any]] = []
        self.num_tokens = 0
        self._reader = CallDeltas(plan, whole=whole) if plan.parser is not None else None
        self._top = top or 0
        self._open = False  # the last item may grow
        self._waiting_logprobs = EncodedList()  # of tokens whose text is not certain yet

    def feed(self, text: str, tokens: Sequence[int], logprobs: Any, finish: str | None) -> list[dict[str, Any]]:
        """Add a delta of the output."""
        self.num_tokens += len(tokens)
        events: list[dict[str, Any]] = []
        new_logprobs = EncodedList()
        if logprobs is not None:
            chat_logprobs(tokens, logprobs, self._top, new_logprobs)
        if self._reader is None:
            return self._add_text(text, new_logprobs) if text or new_logprobs else events
        self._waiting_logprobs += new_logprobs
        for delta in self._reader.feed(text, finish):
            if "content" in delta:
                ready, self._waiting_logprobs = self._waiting_logprobs, EncodedList()
                events += self._add_text(delta["content"], ready)
            for part in delta.get("tool_calls", ()):
                events += self._add_to_call(part)
        return events

    def end(self, reason: str | None) -> list[dict[str, Any]]:
        """End the last item. An output without text or calls gets an empty message."""
        begun = [] if self.items else self._add_text("", EncodedList())
        cut = reason == "length" or (self._reader is not None and self._reader.in_call)
        return begun + self._close("incomplete" if cut else "completed")

    def _add_text(self, text: str, logprobs: EncodedList) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        if not self._open or self.items[-1]["type"] != "message":
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": EncodedList()}
            item = {"type": "message", "id": new_id("msg"), "role": "assistant", "content": []}
            events = self._begin(item)
            self.items[-1]["content"] = [part]
            events.append(self._event("response.content_part.added", content_index=0, part={**part, "logprobs": []}))
        (part,) = self.items[-1]["content"]
        part["text"] += text
        part["logprobs"] += logprobs
        delta = self._event("response.output_text.delta", content_index=0, delta=text, logprobs=logprobs)
        return [*events, delta]

    def _add_to_call(self, part: Mapping[str, Any]) -> list[dict[str, Any]]:
        function = part["function"]
        if "id" in part:
            names = {"call_id": part["id"], "name": function["name"], "arguments": ""}
            return self._begin({"type": "function_call", "id": new_id("fc"), **names})
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
