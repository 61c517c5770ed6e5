"""Text to tokens and back. `tokenizers` alone, where the model has a tokenizer.json: no torch, milliseconds."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer as FastTokenizer

from shoal.errors import CheckpointError
from shoal.lazy import load

_TAIL_TOKENS = 8  # more than any character has bytes
_INCOMPLETE = "\ufffd"  # what stands for bytes that are no whole character


class Tokenizer(Protocol):
    def encode(self, text: str) -> list[int]:
        """With the special tokens that the model expects around a text."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Without special tokens."""


def continuation(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """The text that tokens add behind a prompt.

    Decoded alone they may lose their first space (SentencePiece strips a text's) or a character that began in the
    prompt. So they are decoded behind the prompt's last few, whose own text is then taken off.
    """
    tail = list(prompt[-_TAIL_TOKENS:])
    before = tokenizer.decode(tail).rstrip(_INCOMPLETE)
    whole = tokenizer.decode([*tail, *tokens])
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(tokens)


class _Fast:
    def __init__(self, file: Path) -> None:
        try:
            self._tokenizer: FastTokenizer = FastTokenizer.from_file(str(file))
        except Exception as error:  # noqa: BLE001 - the library raises nothing narrower
            raise CheckpointError(f"{file} can't be read: {error}") from None
        self._tokenizer.no_truncation()  # a fine-tune may have left its own settings in the file
        self._tokenizer.no_padding()

    def encode(self, text: str) -> list[int]:
        found: list[int] = self._tokenizer.encode(text).ids
        return found

    def decode(self, tokens: Sequence[int]) -> str:
        found: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return found


class _Slow:
    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text).input_ids)

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))


def open_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a model folder; None where it has none, so that prompts must be token ids.

    Raises:
        CheckpointError: there is one that can't be read.
    """
    if (folder / "tokenizer.json").exists():
        return _Fast(folder / "tokenizer.json")
    if not any((folder / name).exists() for name in ("tokenizer.model", "tokenizer_config.json", "vocab.json")):
        return None
    try:
        return _Slow(load("transformers:AutoTokenizer").from_pretrained(str(folder)))
    except ImportError:
        raise CheckpointError(
            f"{folder} has no tokenizer.json; its tokenizer needs `pip install transformers`"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: the tokenizer can't be read: {str(error).splitlines()[0]}") from None


def eos_tokens(folder: Path) -> tuple[int, ...]:
    """The ids that end a text: generation_config.json's and config.json's."""
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        try:
            ids = json.loads((folder / name).read_text("utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            continue
        found += ids if isinstance(ids, list) else [ids] if isinstance(ids, int) else []
    return tuple(dict.fromkeys(found))
