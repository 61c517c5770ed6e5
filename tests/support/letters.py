"""The simplest tokenizer: tokens are characters, and those below 32 are special."""

from collections.abc import Sequence

from shoal.text.text_stream import TextStream


class Letters:
    special_ids = frozenset(range(32))
    size = 0x110000

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [*([1] if add_special_tokens else []), *map(ord, text)]

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(self._text(token, skip_special_tokens) for token in tokens)

    def token_text(self, token: int) -> str:
        return self._text(token, skip=False)

    def token_bytes(self, token: int) -> bytes:
        return self.token_text(token).encode()

    def stream(
        self, prompt: Sequence[int], *, skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> TextStream:
        return _Stream(self, skip_special_tokens)

    def longest_token(self) -> int | None:
        return None

    def serialized(self) -> str:
        raise NotImplementedError

    def _text(self, token: int, skip: bool) -> str:
        return f"<{token}>" * (not skip) if token in self.special_ids else chr(token)


class _Stream:
    def __init__(self, letters: Letters, skip: bool) -> None:
        self._letters = letters
        self._skip = skip

    def push(self, token: int) -> str:
        return self._letters.decode([token], skip_special_tokens=self._skip)

    def flush(self) -> str:
        return ""
