"""The tool calls of an output in OpenAI's form, while the output grows."""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from shoal.openai.tools.call_reader import Arguments, Brackets, Piece, Start
from shoal.openai.tools.tool_plan import ToolPlan


class CallDeltas:
    """Turns the text of an output into OpenAI's deltas: content, and parts of `tool_calls`.

    A call without the end of its arguments is left out, unless the output was cut by its maximum length: then OpenAI's
    API sends the part that there is.

    Args:
        whole: send each call only when it is complete. A stream that sends calls as they come cannot take back the
            beginning of a call that the client's own `stop` then cuts.
    """

    def __init__(self, plan: ToolPlan, *, whole: bool) -> None:
        assert plan.parser is not None
        self._parser = plan.parser()
        self._plan = plan
        self._whole = whole
        self._held: list[dict[str, Any]] = []  # deltas of the call that has not ended
        self._brackets: Brackets | None = None  # of the arguments; None between calls
        self.calls = 0

    @property
    def in_call(self) -> bool:
        """True if the arguments of a call have not ended."""
        return self._brackets is not None

    def feed(self, text: str, finish: str | None) -> list[dict[str, Any]]:
        """Return the deltas of more text. `finish`: the reason if the output ends with it, else None."""
        pieces = self._parser.feed(text) if text else []
        deltas: list[dict[str, Any]] = []
        for piece in pieces + (self._parser.finish() if finish is not None else []):
            delta = self._delta(piece)
            if delta is None:
                continue
            self._follow(piece)
            if not self._whole or isinstance(piece, str):
                deltas.append(delta)
                continue
            self._held.append(delta)
            if not self.in_call:
                deltas += self._held
                self._held = []
        return deltas + (self._held if finish == "length" else [])

    def _follow(self, piece: Piece) -> None:
        if isinstance(piece, Start):
            self._brackets = Brackets()
        elif isinstance(piece, Arguments) and self._brackets is not None:
            for character in piece.text:
                if self._brackets.step(character) and not self._brackets.depth:
                    self._brackets = None
                    break

    def finish_reason(self, reason: str | None) -> str | None:
        """Return the reason why the output ended, as OpenAI's API has it."""
        has_called = self.calls and not self.in_call and not self._plan.named
        return "tool_calls" if reason == "stop" and has_called else reason

    def _delta(self, piece: Piece) -> dict[str, Any] | None:
        if isinstance(piece, str):  # if a schema demands calls, this is a call that was cut off
            return {"content": piece} if self._plan.schema is None else None
        self.calls += isinstance(piece, Start)
        if self._plan.max_calls is not None and self.calls > self._plan.max_calls:
            return None
        if isinstance(piece, Start):
            name = secrets.token_hex(12)
            function = {"name": piece.name, "arguments": ""}
            call = {"id": name[:9] if self._plan.short_ids else f"call_{name}", "type": "function"}
            return {"tool_calls": [{"index": self.calls - 1, **call, "function": function}]}
        return {"tool_calls": [{"index": self.calls - 1, "function": {"arguments": piece.text}}]}


def message_of(deltas: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the message that deltas make together."""
    content = "".join(delta["content"] for delta in deltas if "content" in delta)
    calls: list[dict[str, Any]] = []
    for delta in deltas:
        for part in delta.get("tool_calls", ()):
            if part["index"] == len(calls):
                calls.append({**part, "function": dict(part["function"])})
            else:
                calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    for call in calls:
        del call["index"]
    message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else "")}
    return message | ({"tool_calls": calls} if calls else {})
