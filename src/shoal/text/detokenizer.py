"""The text of one growing output, and where a stop text ends it."""

from collections.abc import Iterable, Sequence

from shoal.text.stop_texts import StopTexts
from shoal.text.token_offsets import TokenOffsets
from shoal.text.tokenizer import Tokenizer


class OutputText:
    """The text of one output, which grows as its tokens arrive, and ends at a stop text.

    The text does not depend on how many tokens arrive at a time. The first stop text that is completed ends the output;
    if one character completes several, the longest of them does. As in vLLM, a stop text that is completed within the
    first `min_tokens` tokens does not end the output.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_tokens: Sequence[int],
        *,
        stop: StopTexts | None = None,
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        min_tokens: int = 0,
        offsets: TokenOffsets | None = None,
    ) -> None:
        """`include_stop`: the text includes the stop text that ended it. `offsets` records the place of each token."""
        self.num_tokens = 0  # tokens so far, the one that completed the stop text included
        self.stopped: str | None = None  # the stop text that ended the output
        self._stream = tokenizer.stream(
            prompt_tokens,
            skip_special_tokens=skip_special_tokens,
            spaces_between_special_tokens=spaces_between_special_tokens,
        )
        self._stop = stop
        self._search_state = 0  # of `StopTexts`
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._offsets = offsets
        self._parts: list[str] = []  # the text that may be shown
        self._taken = 0  # number of parts that `take` has returned
        self._held = ""  # the end of the text: it may be the beginning of a stop text, so it is not shown yet

    def append(self, tokens: Iterable[int]) -> str | None:
        """Add tokens, and return the stop text that ended the output, if any. Tokens after it are ignored."""
        for token in tokens:
            if self.stopped is not None:
                break
            self.num_tokens += 1
            new = self._stream.push(token)
            if self._offsets is not None:
                self._offsets.add(token, new)
            self._add(new, may_stop=self.num_tokens > self._min_tokens)
        return self.stopped

    def finish(self) -> str | None:
        """End the output, so that the text that was held back may be shown. It may still complete a stop text.

        Returns:
            The stop text that ended the output, if any.
        """
        if self.stopped is None:
            self._add(self._stream.flush(), may_stop=self.num_tokens > self._min_tokens)
        if self.stopped is None and self._held:
            self._parts.append(self._held)
            self._held = ""
        return self.stopped

    @property
    def text(self) -> str:
        """The text that may be shown so far. It is never shortened or changed later."""
        return "".join(self._parts)

    def take(self) -> str:
        """Return the text that was added since the last call."""
        new = "".join(self._parts[self._taken :])
        self._taken = len(self._parts)
        return new

    def _add(self, new: str, *, may_stop: bool) -> None:
        if not new:
            return
        if self._stop is None:
            self._parts.append(new)
            return
        self._search_state, found = self._stop.read(self._search_state, new, may_stop=may_stop)
        text = self._held + new
        if found is not None:
            end, self.stopped = found
            end += len(self._held)
            self._parts.append(text[: end if self._include_stop else end - len(self.stopped)])
            self._held = ""
            return
        held = 0 if self._include_stop else self._stop.held(self._search_state)
        self._parts.append(text[: len(text) - held])
        self._held = text[len(text) - held :]
