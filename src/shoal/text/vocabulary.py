"""Tables with the text or bytes of each token, for the two kinds of decoders that only join these.

The decoders are those of https://github.com/huggingface/tokenizers; `decoder_of` recognizes them in a tokenizer.
"""

import json
import re
from typing import Any

from tokenizers import Tokenizer as Library
from tokenizers import models

from shoal.text.text_stream import INCOMPLETE

_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")


class ByteLevel(dict[int, bytes]):
    """The bytes of each token of a byte-level vocabulary (as GPT-2's), where each character stands for a byte."""

    def __init__(self, library: Library) -> None:
        super().__init__()
        self._library = library

    def __missing__(self, token: int) -> bytes:
        text = self._library.id_to_token(token) or ""
        found = self[token] = _decode_bytes(text)
        return found


class ByteFallback(dict[int, "str | int | None"]):
    """The text of each token, or the byte that it stands for, in a vocabulary with byte fallback (as SentencePiece's).

    None for an unknown id. `replaced` has the replacements that the decoder makes in the texts of tokens.
    """

    def __init__(self, library: Library, replaced: list[tuple[str, str]], strip: int) -> None:
        super().__init__()
        self.strip = strip  # number of spaces that are removed from the beginning of a text
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
    """Return the table of a tokenizer's decoder, or None if the decoder is of another kind."""
    # Only the decoder is read as JSON: this is called at every start, and the vocabulary would be megabytes.
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
    """Return the largest number of bytes of a text that one token can stand for, or None if there is no known limit.

    The limit is known for byte-pair encodings with a token for each byte, if the steps before them only split a text or
    make it longer. With others a part of the text may be lost, or any amount of it may become one token.
    """
    model = library.model
    normalized = _read_steps(library.normalizer, "normalizers")
    cut = _read_steps(library.pre_tokenizer, "pretokenizers")
    vocabulary = library.get_vocab()
    bytes_ = (
        _BYTE_OF_CHARACTER if any(step["type"] == "ByteLevel" for step in cut) else {f"<0x{i:02X}>" for i in range(256)}
    )
    known = (
        isinstance(model, models.BPE)
        and model.dropout is None
        and (model.byte_fallback or bytes_ is _BYTE_OF_CHARACTER)
        and all(each in vocabulary for each in bytes_)
        and all(map(_never_shortens, normalized))
        and all(map(_only_cuts, cut))
        and not any(token.lstrip or token.rstrip for token in library.get_added_tokens_decoder().values())
    )
    return max(len(token.encode()) for token in vocabulary) if known else None


def _read_steps(part: Any, name: str) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer, as they are in tokenizer.json."""
    if part is None:
        return []
    state = json.loads(part.__getstate__())
    return [step for each in state.get(name, [state]) for step in each.get(name, [each])]


def _never_shortens(step: dict[str, Any]) -> bool:
    match step:
        case {"type": "Prepend"}:
            return True
        case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)}:
            return len(pattern.encode()) <= len(content.encode())
    return False


def _only_cuts(step: dict[str, Any]) -> bool:
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
    """Return GPT-2's table of characters and bytes: printable bytes are themselves, others are from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_characters()


def raw_bytes(entry: str | bytes) -> bytes | None:
    """Return the bytes that an entry of a vocabulary stands for, if it is written as bytes, else None.

    It may be bytes, `<0xE4>`, or characters of GPT-2's table.
    """
    if isinstance(entry, bytes):
        return entry
    if _BYTE_TOKEN.fullmatch(entry):
        return bytes([int(entry[3:5], 16)])
    return (
        bytes(_BYTE_OF_CHARACTER[character] for character in entry)
        if entry and all(map(_BYTE_OF_CHARACTER.__contains__, entry))
        else None
    )


def _decode_bytes(text: str) -> bytes:
    try:
        return bytes(_BYTE_OF_CHARACTER[character] for character in text)
    except KeyError:  # an added token, which is written as plain text
        return text.encode()
