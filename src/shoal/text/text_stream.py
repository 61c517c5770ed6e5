"""The text of a growing output, token by token: in total what decoding all of it at once would give.

How much must be known before a token's text is certain depends on the tokenizer's decoder. In a byte-level vocabulary
a token is a run of bytes, in a SentencePiece vocabulary with byte fallback it is a text or one byte: there only a
character that is cut in two waits. Any other decoder is asked again, with the tokens before.

Every stream takes the prompt's last tokens too: a first space is kept behind them, and a character that they begin
belongs to the output.
"""

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

INCOMPLETE = "\ufffd"  # what stands for bytes that are no whole character
CONTEXT = 8  # tokens: more than any character has bytes


class TextStream(Protocol):
    def push(self, token: int) -> str:
        """The text that has become certain with this token; often it is the token's own."""

    def flush(self) -> str:
        """The rest, as it reads when no more tokens come."""


class ByteStream:
    """Tokens are runs of bytes, which together are UTF-8. `bytes_of` gives b"" for a token that is left out."""

    def __init__(self, bytes_of: Callable[[int], bytes], prompt: Sequence[int]) -> None:
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in prompt[-CONTEXT:]:
            self._decoder.decode(bytes_of(token))

    def push(self, token: int) -> str:
        return self._decoder.decode(self._bytes_of(token))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class FallbackStream:
    """Tokens are texts, or single bytes of what the vocabulary has no text for.

    `piece_of` gives a token's text or byte, None for a token that is left out. `strip`: as many spaces are taken off
    the front of a whole text.

    Decoded at once, a run of bytes that is no UTF-8 is unreadable as a whole. Here the characters before the first
    wrong byte stay: they are shown when they are complete, and a new line, which is such a byte, can end an output.
    """

    def __init__(self, piece_of: Callable[[int], str | int | None], prompt: Sequence[int], *, strip: int) -> None:
        self._piece_of = piece_of
        self._bytes = codecs.getincrementaldecoder("utf-8")(_BYTE_BY_BYTE)
        self._strip = strip
        for token in prompt[-CONTEXT:]:
            self.push(token)
        if any(piece_of(token) is not None for token in prompt):
            self._strip = 0

    def push(self, token: int) -> str:
        piece = self._piece_of(token)
        if piece is None:
            return ""
        if isinstance(piece, int):
            return self._stripped(self._bytes.decode(bytes([piece])))
        return self._stripped(self._end_run() + piece)

    def flush(self) -> str:
        return self._stripped(self._end_run())

    def _end_run(self) -> str:
        text = self._bytes.decode(b"", final=True)
        self._bytes.reset()
        return text

    def _stripped(self, text: str) -> str:
        if not self._strip or not text:
            return text
        spaces = len(text) - len(text.lstrip(" "))
        rest = text[min(self._strip, spaces) :]
        self._strip = 0 if rest else self._strip - len(text)
        return rest


def _replace_every_byte(error: UnicodeError) -> tuple[str, int]:
    """As the byte fallback decoder has it; Python's "replace" takes the bytes of a cut character for one."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return INCOMPLETE * (error.end - error.start), error.end


_BYTE_BY_BYTE = "shoal.replace-every-byte"
codecs.register_error(_BYTE_BY_BYTE, _replace_every_byte)


class RedecodingStream:
    """Any other decoder: new tokens are decoded behind those before them, whose own text is then taken off.

    Text that ends in an incomplete character waits. A run of tokens that are no text at all is decoded anew at every
    token of it; the two decoders of vocabularies that have such tokens have the streams above.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int]) -> None:
        """`decode` leaves special tokens out, if that is wanted; then they are left out of `prompt` too."""
        self._decode = decode
        self._context = list(prompt[-CONTEXT:])
        self._before = decode(self._context).rstrip(INCOMPLETE)
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        self._pending.append(token)
        whole = self._decode(self._context + self._pending)
        return "" if whole.endswith(INCOMPLETE) else self._take(whole)

    def flush(self) -> str:
        return self._take(self._decode(self._context + self._pending))

    def _take(self, whole: str) -> str:
        new = whole[len(self._before) :]
        if new:
            self._context, self._pending = self._pending, []
            self._before = self._decode(self._context)
        return new
