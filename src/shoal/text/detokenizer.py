"""The text of one growing output, and where a stop text ends it."""

from collections.abc import Iterable, Sequence

from shoal.text.stop_texts import StopTexts
from shoal.text.token_places import TokenPlaces
from shoal.text.tokenizer import Tokenizer


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
        stop: StopTexts | None = None,
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
        places: TokenPlaces | None = None,
    ) -> None:
        """`places` is told of each token."""
        self.num_tokens = 0  # up to and including the one that completed the stop text
        self.stopped: str | None = None
        self._stream = tokenizer.stream(prompt_tokens, skip_special_tokens=skip_special_tokens)
        self._stop = stop
        self._state = 0  # of the search
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._places = places
        self._parts: list[str] = []  # what is shown
        self._taken = 0  # parts of it that `take` gave
        self._held = ""  # the end of the text, which may be the beginning of a stop text and is not shown

    def append(self, tokens: Iterable[int]) -> str | None:
        """The stop text that was found; nothing more is taken after it."""
        for token in tokens:
            if self.stopped is not None:
                break
            self.num_tokens += 1
            new = self._stream.push(token)
            if self._places is not None:
                self._places.add(token, new)
            self._add(new, counts=self.num_tokens > self._min_tokens)
        return self.stopped

    def finish(self) -> str | None:
        """No more tokens come: what was held back is shown. It may still complete a stop text."""
        if self.stopped is None:
            self._add(self._stream.flush(), counts=self.num_tokens > self._min_tokens)
        if self.stopped is None and self._held:
            self._parts.append(self._held)
            self._held = ""
        return self.stopped

    @property
    def text(self) -> str:
        """What may be shown now: it only ever grows."""
        return "".join(self._parts)

    def take(self) -> str:
        """What the text has gained since the last call."""
        new = "".join(self._parts[self._taken :])
        self._taken = len(self._parts)
        return new

    def _add(self, new: str, *, counts: bool) -> None:
        if not new:
            return
        if self._stop is None:
            self._parts.append(new)
            return
        self._state, found = self._stop.read(self._state, new, counts=counts)
        text = self._held + new
        if found is not None:
            end, self.stopped = found
            end += len(self._held)
            self._parts.append(text[: end if self._include_stop else end - len(self.stopped)])
            self._held = ""
            return
        held = 0 if self._include_stop else self._stop.held(self._state)
        self._parts.append(text[: len(text) - held])
        self._held = text[len(text) - held :]
