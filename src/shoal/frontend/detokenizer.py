"""The text of one growing output, and where a stop text ends it."""

from array import array
from collections.abc import Iterable, Sequence
from functools import lru_cache

from shoal.frontend.token_places import TokenPlaces
from shoal.frontend.tokenizer import Tokenizer


@lru_cache(maxsize=16)  # for the outputs of a request, which are made one after the other
def _borders(text: str) -> "array[int]":
    """For each beginning of the text, by its length - 1: how long the longest shorter one is that it also ends with.

    The failure function of Knuth, Morris and Pratt, Fast Pattern Matching in Strings, 1977. Not to be written to.
    """
    borders = array("i", [0]) * len(text)
    length = 0
    for end in range(1, len(text)):
        while length and text[end] != text[length]:
            length = borders[length - 1]
        length += text[end] == text[length]
        borders[end] = length
    return borders


class _Search:
    """Looks for one stop text, character by character: time and memory in proportion to the texts."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0  # the length of the longest beginning of the stop text, short of all, that the text ends with
        self._borders = _borders(stop)

    def find(self, new: str, *, counts: bool) -> int | None:
        """Reads on, to the first end of the stop text if that counts: how many of the new characters that took."""
        if not self.matched and self.stop[0] not in new:  # mostly
            return None
        stop, borders, matched, end = self.stop, self._borders, self.matched, None
        for at, character in enumerate(new, 1):
            while matched and stop[matched] != character:
                matched = borders[matched - 1]
            matched += stop[matched] == character
            if matched == len(stop):
                matched = borders[-1]
                if counts:
                    end = at
                    break
        self.matched = matched
        return end


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
        places: TokenPlaces | None = None,
    ) -> None:
        """`places` is told of each token."""
        self.num_tokens = 0  # up to and including the one that completed the stop text
        self.stopped: str | None = None
        self._stream = tokenizer.stream(prompt_tokens, skip_special_tokens=skip_special_tokens)
        self._searches = [_Search(text) for text in stop]
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
        if not self._searches:
            self._parts.append(new)
            return
        found = self._find(new, counts=counts)
        text = self._held + new
        if found is not None:
            end, self.stopped = found
            end += len(self._held)
            self._parts.append(text[: end if self._include_stop else end - len(self.stopped)])
            self._held = ""
            return
        held = 0 if self._include_stop else max(search.matched for search in self._searches)
        self._parts.append(text[: len(text) - held])
        self._held = text[len(text) - held :]

    def _find(self, new: str, *, counts: bool) -> tuple[int, str] | None:
        """How many of the new characters complete a stop text, and which one: of several the longest."""
        ends = [(search.find(new, counts=counts), search.stop) for search in self._searches]
        found = [(end, stop) for end, stop in ends if end is not None]
        return min(found, key=lambda each: (each[0], -len(each[1])), default=None)
