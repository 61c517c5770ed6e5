"""Streams that turn the tokens of an output into text one by one; the whole is the same as decoding all at once.

It depends on the tokenizer's decoder when the text of a token is certain. In a byte-level vocabulary a token is a run
of bytes; in a SentencePiece vocabulary with byte fallback it is a text or one byte. With these, only a character whose
bytes are not complete has to wait. With any other decoder, a token is decoded together with the tokens before it.

Every stream also gets the last tokens of the prompt. So a space at the beginning of the output is kept, and a character
that the prompt begins belongs to the output.

The `tokenizers` library has a `DecodeStream` of its own. It is not used, because it cannot be ended: the rest of an
output that stops inside a character would be lost.
"""

import codecs
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

INCOMPLETE = "\ufffd"  # stands for bytes that are not a complete character
CONTEXT = 8  # tokens of the prompt that a stream reads: more than the bytes of any character


class TextStream(Protocol):
    """A stream that turns the tokens of one output into text."""

    def push(self, token: int) -> str:
        """Add a token, and return the text that is certain now and was not before; usually that of the token."""

    def flush(self) -> str:
        """End the stream, and return the rest of the text."""


class ByteStream:
    """A stream for tokens that are runs of bytes, which together are UTF-8.

    `bytes_of` returns b"" for a token that is to be left out.
    """

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
    """A stream for tokens that are texts, or single bytes of characters that the vocabulary lacks.

    `piece_of` returns the text or the byte of a token, or None for a token that is to be left out. `strip` is the
    number of spaces that are removed from the beginning of a text, unless the prompt has text.

    There is one difference from decoding all at once, which makes a whole run of byte tokens unreadable if it is not
    valid UTF-8. Here the characters before the first invalid byte are kept: each is shown as soon as it is complete,
    and a line break, which may be a byte token, can end an output.
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
    """Replace each invalid byte by one mark, as the library's decoder does; Python's "replace" may combine several."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return INCOMPLETE * (error.end - error.start), error.end


_BYTE_BY_BYTE = "shoal.replace-every-byte"
codecs.register_error(_BYTE_BY_BYTE, _replace_every_byte)


class RedecodingStream:
    """A stream for any other decoder: new tokens are decoded after those before them, whose text is then removed.

    Text that ends in an incomplete character has to wait. While tokens give no text at all, each new one has all of
    them decoded again; vocabularies with many such tokens have one of the decoders above.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int]) -> None:
        """`decode` may leave out special tokens; then `prompt` must not contain them either."""
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


class UnspacedStream:
    """A stream without the spaces that the decoder puts between two added tokens that follow each other.

    Args:
        stream: the stream with the spaces.
        added: the texts of the tokens that were added to the vocabulary, such as special tokens.
        prompt: the prompt of the stream.
    """

    def __init__(self, stream: TextStream, added: Mapping[int, str], prompt: Sequence[int]) -> None:
        self._stream = stream
        self._added = added
        self._is_after_added = bool(prompt) and prompt[-1] in added

    def push(self, token: int) -> str:
        text = self._stream.push(token)
        own = self._added.get(token)
        if own is not None and self._is_after_added and text.endswith(own):
            text = text[: len(text) - len(own)].rstrip(" ") + own
        self._is_after_added = own is not None
        return text

    def flush(self) -> str:
        return self._stream.flush()
