"""Text to tokens and back. `tokenizers` alone, wherever it will do: no torch, milliseconds."""

import importlib.util
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Library

from shoal.errors import CheckpointError, RequestError
from shoal.git_lfs import refuse_pointer
from shoal.lazy import load
from shoal.text.text_stream import INCOMPLETE, ByteStream, FallbackStream, RedecodingStream, TextStream
from shoal.text.vocabulary import ByteFallback, ByteLevel, decoder_of, longest_token, raw_bytes

_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_OTHERS = ("tokenizer_config.json", "vocab.json", "vocab.txt", "tekken.json")
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MANY = 1000  # tokens
_END_OF_TEXT = "<|endoftext|>"


class Tokenizer(Protocol):
    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are no text: beginnings, ends, roles, padding."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """`add_special_tokens`: with those that the model expects around a text."""

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Ids that the tokenizer does not know are left out."""

    def token_text(self, token: int) -> str:
        """What a token reads as inside a text, be it special or not: " city", not "city"; "" for an unknown id."""

    def token_bytes(self, token: int) -> bytes:
        """`token_text` in UTF-8; of a token that is part of a character, that part."""

    def stream(self, prompt: Sequence[int], *, skip_special_tokens: bool = True) -> TextStream:
        """The text of tokens that follow a prompt, as they come."""

    def longest_token(self) -> int | None:
        """So many bytes of a text a token stands for at most; None where that is not known."""

    def serialized(self) -> str:
        """What a tokenizer.json says, for grammars.

        Raises:
            RequestError: this tokenizer can't be written as one.
        """


def open_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a model folder; None where it has none, so that prompts must be token ids.

    Raises:
        CheckpointError: there is one that can't be read, or that needs a package which is not installed.
    """
    config = read_json(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").exists():
        return _from_file(folder / "tokenizer.json", config)
    if _is_gpt2(folder, config):
        return _from_vocabulary(folder, config)
    if any((folder / name).exists() for name in _SENTENCEPIECE + _OTHERS) or any(folder.glob("*.tiktoken")):
        return _through_transformers(folder)
    return None


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file; empty where there is no file.

    Raises:
        CheckpointError: it can't be read, or is no JSON object.
    """
    refuse_pointer(file)
    try:
        found = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} can't be read: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return found


class FastTokenizer:
    """One of the `tokenizers` library."""

    def __init__(self, library: Library) -> None:
        self._library = library
        library.no_truncation()  # a fine-tune may have left its own settings in the file
        library.no_padding()
        self.special_ids = frozenset(i for i, token in library.get_added_tokens_decoder().items() if token.special)
        self._decoder = decoder_of(library)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        # A batch, since `encode` keeps all other threads of Python waiting, for seconds with a million characters.
        (encoding,) = self._library.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        found: list[int] = encoding.ids
        return found

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        if len(tokens) < _MANY:
            found: str = self._library.decode(list(tokens), skip_special_tokens=skip_special_tokens)
        else:  # a batch, for the same reason, which costs more where they are few
            (found,) = self._library.decode_batch([list(tokens)], skip_special_tokens=skip_special_tokens)
        return found

    def token_text(self, token: int) -> str:
        match self._decoder:
            case ByteLevel() as decoder:
                return decoder[token].decode("utf-8", "replace")
            case ByteFallback() as decoder:
                return decoder.text_of(token)
        return _inner_text(self, token)

    def token_bytes(self, token: int) -> bytes:
        match self._decoder:
            case ByteLevel() as decoder:
                return decoder[token]
            case ByteFallback() as decoder:
                return decoder.bytes_of(token)
        return _inner_bytes(self, token, self._library.id_to_token(token) or "")

    def stream(self, prompt: Sequence[int], *, skip_special_tokens: bool = True) -> TextStream:
        left_out = self.special_ids if skip_special_tokens else frozenset[int]()
        shown = [token for token in prompt if token not in left_out]
        match self._decoder:
            case ByteLevel() as level:
                return ByteStream(lambda token: b"" if token in left_out else level[token], shown)
            case ByteFallback() as fallback:
                strip = fallback.strip
                return FallbackStream(lambda token: None if token in left_out else fallback[token], shown, strip=strip)
        return RedecodingStream(lambda tokens: self.decode(tokens, skip_special_tokens=skip_special_tokens), shown)

    def longest_token(self) -> int | None:
        return self._longest

    @cached_property
    def _longest(self) -> int | None:
        return longest_token(self._library)

    def serialized(self) -> str:
        found: str = self._library.to_str()
        return found


class SlowTokenizer:
    """One of transformers' that is written in Python, or wraps another library."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._size = len(tokenizer)
        self.special_ids = frozenset(int(token) for token in tokenizer.all_special_ids)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=add_special_tokens).input_ids)

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        # No clean-up: it takes out spaces before punctuation, also those that were meant.
        options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
        # Models pad their vocabularies, and libraries fail at an id that they do not have.
        known = [token for token in tokens if token < self._size]
        return str(self._tokenizer.decode(known, **options))

    def token_text(self, token: int) -> str:
        return _inner_text(self, token)

    def token_bytes(self, token: int) -> bytes:
        entry = self._tokenizer.convert_ids_to_tokens(token) if token < self._size else ""
        return _inner_bytes(self, token, entry or "")

    def stream(self, prompt: Sequence[int], *, skip_special_tokens: bool = True) -> TextStream:
        shown = [token for token in prompt if not skip_special_tokens or token not in self.special_ids]
        return RedecodingStream(lambda tokens: self.decode(tokens, skip_special_tokens=skip_special_tokens), shown)

    def longest_token(self) -> int | None:
        return None

    def serialized(self) -> str:
        raise RequestError(
            f"structured outputs need a tokenizer.json; {type(self._tokenizer).__name__} can't be written as one"
        )


def _inner_text(tokenizer: Tokenizer, token: int) -> str:
    """Of two in a row the second is inside a text, so that it keeps its space."""
    first = tokenizer.decode([token], skip_special_tokens=False)
    return tokenizer.decode([token, token], skip_special_tokens=False)[len(first) :]


def _inner_bytes(tokenizer: Tokenizer, token: int, entry: str | bytes) -> bytes:
    """`entry`: how the vocabulary has the token."""
    text = tokenizer.token_text(token)
    found = raw_bytes(entry) if INCOMPLETE in text else None
    return text.encode("utf-8", "replace") if found is None else found


def _from_file(file: Path, config: dict[str, Any]) -> FastTokenizer:
    refuse_pointer(file)
    try:
        library = Library.from_file(str(file))
    except Exception as error:  # noqa: BLE001 - the library raises nothing narrower
        raise CheckpointError(f"{file} can't be read: {error}") from None
    _add_tokens(library, config, file.parent)
    return FastTokenizer(library)


def _is_gpt2(folder: Path, config: dict[str, Any]) -> bool:
    """Is it GPT-2's byte-level vocabulary in two files? Other tokenizers have files of these names too."""
    kind = config.get("tokenizer_class")
    if kind is None:
        model = read_json(folder / "config.json")
        kind = model.get("tokenizer_class") or {"gpt2": "GPT2Tokenizer"}.get(str(model.get("model_type")))
    return kind in ("GPT2Tokenizer", "GPT2TokenizerFast") and all(
        (folder / name).exists() for name in ("vocab.json", "merges.txt")
    )


def _from_vocabulary(folder: Path, config: dict[str, Any]) -> FastTokenizer:
    """vocab.json and merges.txt, read as transformers' GPT2Tokenizer does."""
    for name in ("vocab.json", "merges.txt"):
        refuse_pointer(folder / name)
    try:
        model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"), fuse_unk=False)
    except Exception as error:  # noqa: BLE001 - the library raises nothing narrower
        raise CheckpointError(f"{folder}: vocab.json and merges.txt can't be read: {error}") from None
    library = Library(model)
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space", False)))
    library.decoder = decoders.ByteLevel()
    defaults = dict.fromkeys(("unk_token", "bos_token", "eos_token"), _END_OF_TEXT)
    names = {**defaults, **config}
    if "added_tokens_decoder" not in config:
        names |= read_json(folder / "special_tokens_map.json")
    _add_tokens(library, names, folder)
    before = _content(names.get("bos_token")) if config.get("add_bos_token") else None
    after = _content(names.get("eos_token")) if config.get("add_eos_token") else None
    library.post_processor = processors.TemplateProcessing(
        single=[*([before] if before else []), "$A", *([after] if after else [])],
        special_tokens=[(token, library.token_to_id(token)) for token in {before, after} if token],
    )
    return FastTokenizer(library)


def _add_tokens(library: Library, config: dict[str, Any], folder: Path) -> None:
    """Adds what tokenizer_config.json says beyond the vocabulary's file, in transformers' order.

    Raises:
        CheckpointError: it is not of the form that transformers writes.
    """
    try:
        listed = _listed_tokens(config, folder)
        known = {repr(token) for token in library.get_added_tokens_decoder().values()}
        missing = [token for token in listed if repr(token) not in known]
        seen = {token.content for token in library.get_added_tokens_decoder().values()} | {t.content for t in missing}
        for token in _special_tokens(config):
            if token.content not in seen:
                missing.append(token)
                seen.add(token.content)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{folder / 'tokenizer_config.json'}: its tokens can't be read: {error}") from None
    library.add_tokens(missing)


def _listed_tokens(config: dict[str, Any], folder: Path) -> list[AddedToken]:
    """Those with ids: of `added_tokens_decoder`, else of the older added_tokens.json, which says no more than ids."""
    if "added_tokens_decoder" in config:
        entries = config["added_tokens_decoder"]
        return [AddedToken(**entries[key]) for key in sorted(entries, key=int)]
    special = {token.content for token in _special_tokens(config)}
    added = read_json(folder / "added_tokens.json")
    return [
        AddedToken(content, special=content in special, normalized=content not in special)
        for content in sorted(added, key=added.__getitem__)
    ]


def _special_tokens(config: dict[str, Any]) -> list[AddedToken]:
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    values = [config.get(name) for name in _NAMED] + list(extra.values() if isinstance(extra, dict) else extra)
    found = []
    for value in values:
        if isinstance(value, dict):
            known = ("content", "single_word", "lstrip", "rstrip", "normalized")
            found.append(AddedToken(**{key: value[key] for key in known if key in value}, special=True))
        elif value is not None:
            found.append(AddedToken(value, special=True))
    return found


def _content(value: Any) -> str | None:
    found = value.get("content") if isinstance(value, dict) else value
    return found if isinstance(found, str) else None


def _through_transformers(folder: Path) -> Tokenizer:
    for file in (*(folder / name for name in _SENTENCEPIECE + _OTHERS), *folder.glob("*.tiktoken")):
        refuse_pointer(file)
    try:
        # Never code that came with a checkpoint; None would ask at the terminal.
        found = load("transformers:AutoTokenizer").from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - transformers and what it calls raise anything
        needed = [package for package, module in _needed(folder).items() if not _installed(module)]
        if needed:
            raise CheckpointError(
                f"{folder} has no tokenizer.json; its tokenizer needs `pip install {' '.join(needed)}`"
            ) from None
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{folder}: the tokenizer can't be read: {why}") from None
    library = getattr(found, "backend_tokenizer", None)
    return FastTokenizer(library) if isinstance(library, Library) else SlowTokenizer(found)


def _needed(folder: Path) -> dict[str, str]:
    """What must be installed: package -> module."""
    found = {"transformers": "transformers"}
    if any((folder / name).exists() for name in _SENTENCEPIECE):
        found |= {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
    if any(folder.glob("*.tiktoken")) or (folder / "tekken.json").exists():
        found["tiktoken"] = "tiktoken"
    return found


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it would lie in
        return False
