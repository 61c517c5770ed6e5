"""What single tokens read as, for the two kinds of decoders where that is all a text is made of.

The decoders are those of https://github.com/huggingface/tokenizers; `decoder_of` recognizes them in what a
tokenizer.json says.
"""

import json
import re
from typing import Any

from tokenizers import Tokenizer as Library
from tokenizers import models

from shoal.text.text_stream import INCOMPLETE

_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")


class ByteLevel(dict[int, bytes]):
    """Token -> bytes, as GPT-2 began it: a character stands for a byte."""

    def __init__(self, library: Library) -> None:
        super().__init__()
        self._library = library

    def __missing__(self, token: int) -> bytes:
        text = self._library.id_to_token(token) or ""
        found = self[token] = _bytes_of(text)
        return found


class ByteFallback(dict[int, "str | int | None"]):
    """Token -> text, or the byte that it stands for; None for an unknown id. As SentencePiece has them."""

    def __init__(self, library: Library, replaced: list[tuple[str, str]], strip: int) -> None:
        super().__init__()
        self.strip = strip  # so many spaces are taken off the front of a whole text
        self._library = library
        self._replaced = replaced

    def __missing__(self, token: int) -> str | int | None:
        found = self[token] = self._piece(self._library.id_to_token(token))
        return found

    def _piece(self, text: str | None) -> str | int | None:
        if text is None:
            return None
        for pattern, content in self._replaced:
            text = text.replace(pattern, content)
        return int(text[3:5], 16) if _BYTE_TOKEN.fullmatch(text) else text

    def bytes_of(self, token: int) -> bytes:
        piece = self[token]
        return bytes([piece]) if isinstance(piece, int) else (piece or "").encode()

    def text_of(self, token: int) -> str:
        piece = self[token]
        if isinstance(piece, int):
            return chr(piece) if piece < 0x80 else INCOMPLETE
        return piece or ""


def decoder_of(library: Library) -> ByteLevel | ByteFallback | None:
    """None: a decoder of another kind."""
    # Without its vocabulary: this is asked at every start, and a vocabulary is megabytes of JSON.
    decoder = library.decoder
    state: Any = json.loads(decoder.__getstate__()) if decoder is not None else None
    steps = state.get("decoders", [state]) if isinstance(state, dict) else []
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return ByteLevel(library)
    if "ByteFallback" not in kinds or (kinds[-1:] == ["Strip"] and kinds[-2:] != ["Fuse", "Strip"]):
        return None
    return _byte_fallback(library, steps)


def longest_token(library: Library) -> int | None:
    """So many bytes of a text a token stands for at most. None: some of a text may be lost, or any amount of it become
    one token, or it isn't known.

    It is known of byte-pair encodings that have a token for each byte, behind steps that only cut or lengthen a text.
    """
    model = library.model
    normalized = _steps(library.normalizer, "normalizers")
    cut = _steps(library.pre_tokenizer, "pretokenizers")
    vocabulary = library.get_vocab()
    bytes_ = _BYTES if any(step["type"] == "ByteLevel" for step in cut) else {f"<0x{i:02X}>" for i in range(256)}
    known = (
        isinstance(model, models.BPE)
        and model.dropout is None
        and (model.byte_fallback or bytes_ is _BYTES)
        and all(each in vocabulary for each in bytes_)
        and all(map(_lengthens, normalized))
        and all(map(_keeps_all, cut))
        and not any(token.lstrip or token.rstrip for token in library.get_added_tokens_decoder().values())
    )
    return max(len(token.encode()) for token in vocabulary) if known else None


def _steps(part: Any, name: str) -> list[dict[str, Any]]:
    """What a normalizer or the like does, one after another."""
    if part is None:
        return []
    state = json.loads(part.__getstate__())
    return [step for each in state.get(name, [state]) for step in each.get(name, [each])]


def _lengthens(step: dict[str, Any]) -> bool:
    match step:
        case {"type": "Prepend"}:
            return True
        case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)}:
            return len(pattern.encode()) <= len(content.encode())
    return False


def _keeps_all(step: dict[str, Any]) -> bool:
    if step["type"] in ("Split", "Punctuation"):
        return bool(step["behavior"] != "Removed")
    return step["type"] in ("ByteLevel", "Digits", "Metaspace")


def _byte_fallback(library: Library, steps: list[dict[str, Any]]) -> ByteFallback | None:
    replaced, strip = [], 0
    at = [step["type"] for step in steps].index("ByteFallback")
    for i, step in enumerate(steps):
        match step:
            case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)} if i < at:
                replaced.append((pattern, content))
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0} if i > at:
                strip += start
            case {"type": "ByteFallback"} | {"type": "Fuse"}:
                pass
            case _:
                return None
    return ByteFallback(library, replaced, strip)


def _byte_characters() -> dict[str, int]:
    """GPT-2's table: printable bytes are themselves, the others come after them from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_characters()


def raw_bytes(entry: str | bytes) -> bytes | None:
    """What a vocabulary's entry says that is no whole character: <0xE4>, or one of GPT-2's. None: it says nothing."""
    if isinstance(entry, bytes):
        return entry
    if _BYTE_TOKEN.fullmatch(entry):
        return bytes([int(entry[3:5], 16)])
    return bytes(_BYTES[character] for character in entry) if entry and all(map(_BYTES.__contains__, entry)) else None


def _bytes_of(text: str) -> bytes:
    try:
        return bytes(_BYTES[character] for character in text)
    except KeyError:  # an added token, written as it reads
        return text.encode()
