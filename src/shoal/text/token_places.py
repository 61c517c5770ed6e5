"""Where the tokens of a text begin in it, and which of its bytes each of them brought."""

import codecs
from collections.abc import Sequence

from shoal.text.tokenizer import Tokenizer

_NEARBY = 32  # characters in which a prompt's next token is looked for, where the tokenizer changed the text


class TokenPlaces:
    """Fills up as tokens come. `starts`: how many whole characters of the text stand before each token, so that tokens
    inside one character share a place. `added`: their bytes in this text, none of a token that is left out of it; all
    together are the text in UTF-8, as far as it is UTF-8."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self.starts: list[int] = []
        self.added: list[bytes] = []
        self._tokenizer = tokenizer
        self.length = 0
        self._left_out = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._character = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int, new: str) -> None:
        """`new`: the text that became certain with the token, as `TextStream.push` gives it."""
        self.starts.append(self.length)
        self.length += len(new)
        own = b"" if token in self._left_out else self._tokenizer.token_bytes(token)
        begun = self._character.getstate()[0]
        self._character.decode(own)
        # Of whole characters the text knows best: a first space may be gone from it.
        self.added.append(new.encode("utf-8", "replace") if not begun and is_text(own) else own)


def is_text(own: bytes) -> bool:
    """Is it whole characters, and not a part of one?"""
    try:
        own.decode()
    except UnicodeDecodeError:
        return False
    return True


def prompt_text(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """A prompt of ids as it is shown before its outputs, special tokens included: without the bytes at its end that
    are no whole character yet, for they belong to the outputs' texts."""
    stream = tokenizer.stream((), skip_special_tokens=False)
    return "".join([stream.push(token) for token in tokens])


def prompt_starts(tokenizer: Tokenizer, tokens: Sequence[int], text: str) -> list[int]:
    """Where the tokens of a prompt begin in its text. Those that the tokenizer put around it have no characters."""
    stream = tokenizer.stream((), skip_special_tokens=False)
    starts, at = [], 0
    for token in tokens:
        piece = stream.push(token)
        if not text.startswith(piece, at):
            if token in tokenizer.special_ids:
                piece = ""
            elif text.startswith(piece[1:], at) and piece.startswith(" "):  # put before a first word
                piece = piece[1:]
            else:
                found = text.find(piece, at, at + len(piece) + _NEARBY)
                at = at if found < 0 else found
        starts.append(min(at, len(text)))
        at += len(piece)
    return starts
