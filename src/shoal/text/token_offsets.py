"""The offset of each token in a text, and the bytes that it adds, for log-probabilities and echoed prompts."""

import codecs
from collections.abc import Sequence

from shoal.text.tokenizer import Tokenizer

_NEARBY = 32  # characters in which the next token of a prompt is searched for if the tokenizer changed the text


class TokenOffsets:
    """The offsets and bytes of the tokens of one output, recorded as they come."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        # For each token, the number of complete characters before it; tokens inside one character have the same number.
        self.offsets: list[int] = []
        # For each token, its bytes in the text; none if it is left out. Together they are the text in UTF-8, as far as
        # it is valid UTF-8.
        self.token_bytes: list[bytes] = []
        self._tokenizer = tokenizer
        self.length = 0  # number of characters of the text
        self._left_out = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._character = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int, new: str) -> None:
        """Record a token. `new` is the text that `TextStream.push` returned for it."""
        self.offsets.append(self.length)
        self.length += len(new)
        own = b"" if token in self._left_out else self._tokenizer.token_bytes(token)
        begun = self._character.getstate()[0]
        self._character.decode(own)
        # A token of complete characters has the bytes that it has in the text, where a first space may be missing.
        self.token_bytes.append(new.encode("utf-8", "replace") if not begun and is_complete_text(own) else own)


def is_complete_text(own: bytes) -> bool:
    """Return whether the bytes are complete characters in UTF-8."""
    try:
        own.decode()
    except UnicodeDecodeError:
        return False
    return True


def prompt_text(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """Return the text of a prompt of token ids, with special tokens, as it is shown before its outputs.

    Bytes at its end that are not a complete character are left out, since they belong to the text of the outputs.
    """
    stream = tokenizer.stream((), skip_special_tokens=False)
    return "".join([stream.push(token) for token in tokens])


def prompt_offsets(tokenizer: Tokenizer, tokens: Sequence[int], text: str) -> list[int]:
    """Return the number of characters before each token of a prompt in its text.

    Tokens that the tokenizer added around the text have no characters.
    """
    stream = tokenizer.stream((), skip_special_tokens=False)
    offsets, at = [], 0
    for token in tokens:
        piece = stream.push(token)
        if not text.startswith(piece, at):
            if token in tokenizer.special_ids:
                piece = ""
            elif text.startswith(piece[1:], at) and piece.startswith(" "):  # a space added before the first word
                piece = piece[1:]
            else:
                found = text.find(piece, at, at + len(piece) + _NEARBY)
                at = at if found < 0 else found
        offsets.append(min(at, len(text)))
        at += len(piece)
    return offsets
