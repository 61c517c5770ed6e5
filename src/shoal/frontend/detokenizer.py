"""The text of one growing output, and where a stop text ends it."""

from collections.abc import Iterable, Sequence

from shoal.frontend.tokenizer import Tokenizer


class OutputText:
    """The text that tokens add behind a prompt, however they arrive.

    The first stop text to be completed ends the output; of several that are completed by the same character, the one
    that began first. As with vLLM, one that the first `min_tokens` tokens complete does not count.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_tokens: Sequence[int],
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        self.num_tokens = 0  # up to and including the one that completed the stop text
        self.stopped: str | None = None
        self._stream = tokenizer.stream(prompt_tokens, skip_special_tokens=skip_special_tokens)
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        beginnings = {text[:length] for text in self._stop for length in range(1, len(text))}
        self._beginnings = tuple(sorted(beginnings, key=len, reverse=True))
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._parts: list[str] = []  # what is shown
        self._tail = ""  # the end of the text, as long as a stop text may reach back
        self._held = 0  # characters of the tail that may be the beginning of a stop text, and are not shown

    def append(self, tokens: Iterable[int]) -> str | None:
        """The stop text that was found; nothing more is taken after it."""
        for token in tokens:
            if self.stopped is not None:
                break
            self.num_tokens += 1
            self._add(self._stream.push(token), counts=self.num_tokens > self._min_tokens)
        return self.stopped

    def finish(self) -> str | None:
        """No more tokens come: what was held back is shown. It may still complete a stop text."""
        if self.stopped is None:
            self._add(self._stream.flush(), counts=self.num_tokens > self._min_tokens)
        if self.stopped is None and self._held:
            self._parts.append(self._tail[-self._held :])
            self._held = 0
        return self.stopped

    @property
    def text(self) -> str:
        """What may be shown now: it only ever grows."""
        self._parts = ["".join(self._parts)]
        return self._parts[0]

    def _add(self, new: str, *, counts: bool) -> None:
        if not new:
            return
        if not self._stop:
            self._parts.append(new)
            return
        shown = len(self._tail) - self._held
        text = self._tail + new
        found = self._find(text, len(self._tail)) if counts else None
        if found is None:
            self._held = 0 if self._include_stop else self._beginning_at_end(text)
            end = len(text) - self._held
            self._tail = text[-self._longest :]
        else:
            start, stop = found
            self.stopped, self._held = stop, 0
            end = start + len(stop) if self._include_stop else start
        self._parts.append(text[shown:end])

    def _beginning_at_end(self, text: str) -> int:
        """The length of the longest end of the text that a stop text begins with."""
        if not text.endswith(self._beginnings):
            return 0
        return next(len(beginning) for beginning in self._beginnings if text.endswith(beginning))

    def _find(self, text: str, old: int) -> tuple[int, str] | None:
        """Where a stop text begins that is completed behind the first `old` characters, and which one."""
        hits = []
        for stop in self._stop:
            start = text.find(stop, max(old - len(stop) + 1, 0))
            if start >= 0:
                hits.append((start + len(stop), start, stop))
        if not hits:
            return None
        _, start, stop = min(hits)
        return start, stop
