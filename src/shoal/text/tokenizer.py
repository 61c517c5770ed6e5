"""Tokenizers: text to tokens and back. The `tokenizers` library alone wherever possible: it loads in milliseconds."""

import importlib.util
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Library

from shoal.errors import CheckpointError, ConfigError, structured_outputs_error
from shoal.git_lfs import refuse_pointer
from shoal.lazy import load
from shoal.text.text_stream import (
    INCOMPLETE,
    ByteStream,
    FallbackStream,
    RedecodingStream,
    TextStream,
    UnspacedStream,
)
from shoal.text.vocabulary import ByteFallback, ByteLevel, decoder_of, longest_token, raw_bytes

_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_VOCABULARIES = ("vocab.json", "vocab.txt", "merges.txt", "tekken.json")
_OTHERS = ("tokenizer_config.json", "vocab.json", "vocab.txt", "tekken.json")
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MANY = 1000  # tokens
_END_OF_TEXT = "<|endoftext|>"


class Tokenizer(Protocol):
    """Text to tokens and back, for one model."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are not text: beginnings, ends, roles, padding."""

    @property
    def size(self) -> int:
        """The number of token ids, from 0 to the largest."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the tokens of a text, with the special tokens that the model expects around it."""

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of tokens. Ids that the tokenizer does not know are left out."""

    def token_text(self, token: int) -> str:
        """Return the text of a token, special or not, inside a text: " city", not "city"; "" for an unknown id."""

    def token_bytes(self, token: int) -> bytes:
        """Return `token_text` in UTF-8; if the token is a part of a character, that part."""

    def stream(
        self, prompt: Sequence[int], *, skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> TextStream:
        """Return a stream that turns the tokens that follow a prompt into text one by one.

        Args:
            spaces_between_special_tokens: keep the spaces that the tokenizer puts between added tokens, special or
                not, that follow each other.
        """

    def longest_token(self) -> int | None:
        """Return the most bytes of a text that one token stands for; None if that is not known."""

    def serialized(self) -> str:
        """Return the text of a tokenizer.json, for grammars.

        Raises:
            RequestError: this tokenizer can't be written as one.
        """


def open_tokenizer(folder: Path) -> Tokenizer | None:
    """Return the tokenizer of a model folder; None if it has none, so that prompts must be token ids.

    Raises:
        CheckpointError: the tokenizer can't be read, or needs a package that is not installed.
    """
    config = read_json(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").exists():
        return _from_file(folder / "tokenizer.json", config)
    if _is_gpt2(folder, config):
        return _from_vocabulary(folder, config)
    if any((folder / name).exists() for name in _SENTENCEPIECE + _OTHERS) or any(folder.glob("*.tiktoken")):
        return _through_transformers(folder)
    return None


def open_other_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """Return the tokenizer of a folder, for a model that has its files elsewhere.

    Args:
        vocab_size: of the model; it may be larger than the tokenizer's, since models pad their vocabularies.

    Raises:
        ConfigError: the folder has no tokenizer, or the tokenizer has tokens that the model does not have.
        CheckpointError: as `open_tokenizer`.
    """
    found = open_tokenizer(folder)
    if found is None:
        raise ConfigError(f"--tokenizer: {folder} has no tokenizer; it needs a tokenizer.json or the like")
    if found.size > vocab_size:
        raise ConfigError(
            f"--tokenizer: {folder} has token ids up to {found.size - 1}, the model only up to {vocab_size - 1}: "
            "choose the tokenizer that the model was trained with"
        )
    return found


def vocabulary_files(folder: Path) -> list[Path]:
    """Return the files of a model folder that say which token is which text, in a fixed order."""
    named = [folder / name for name in ("tokenizer.json", *_SENTENCEPIECE, *_VOCABULARIES)]
    return [file for file in [*named, *sorted(folder.glob("*.tiktoken"))] if file.exists()]


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one if there is no file.

    Raises:
        CheckpointError: the file can't be read, or is not a JSON object.
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
    """A tokenizer of the `tokenizers` library."""

    def __init__(self, library: Library) -> None:
        self._library = library
        library.no_truncation()  # settings of a fine-tune may have been left in the file
        library.no_padding()
        self.special_ids = frozenset(i for i, token in library.get_added_tokens_decoder().items() if token.special)
        self._decoder = decoder_of(library)

    @cached_property
    def size(self) -> int:
        return max(self._library.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        # A batch, since `encode` keeps all other threads of Python waiting, for seconds with a million characters.
        (encoding,) = self._library.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        found: list[int] = encoding.ids
        return found

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        if len(tokens) < _MANY:
            found: str = self._library.decode(list(tokens), skip_special_tokens=skip_special_tokens)
        else:  # a batch, for the same reason; with few tokens it costs more
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

    def stream(
        self, prompt: Sequence[int], *, skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> TextStream:
        stream = self._stream(prompt, skip_special_tokens=skip_special_tokens)
        if spaces_between_special_tokens or skip_special_tokens or isinstance(self._decoder, ByteLevel | ByteFallback):
            return stream  # those two decoders put no spaces anywhere
        added = {number: token.content for number, token in self._library.get_added_tokens_decoder().items()}
        return UnspacedStream(stream, added, prompt)

    def _stream(self, prompt: Sequence[int], *, skip_special_tokens: bool) -> TextStream:
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
    """A tokenizer of the transformers library that is written in Python, or wraps another library."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.size = len(tokenizer)
        self.special_ids = frozenset(int(token) for token in tokenizer.all_special_ids)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=add_special_tokens).input_ids)

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        # No clean-up: it removes spaces before punctuation, even those that are meant.
        options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
        # Models pad their vocabularies, and libraries fail for ids that they do not have.
        known = [token for token in tokens if token < self.size]
        return str(self._tokenizer.decode(known, **options))

    def token_text(self, token: int) -> str:
        return _inner_text(self, token)

    def token_bytes(self, token: int) -> bytes:
        entry = self._tokenizer.convert_ids_to_tokens(token) if token < self.size else ""
        return _inner_bytes(self, token, entry or "")

    def stream(
        self, prompt: Sequence[int], *, skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> TextStream:
        shown = [token for token in prompt if not skip_special_tokens or token not in self.special_ids]
        stream = RedecodingStream(lambda tokens: self.decode(tokens, skip_special_tokens=skip_special_tokens), shown)
        if spaces_between_special_tokens or skip_special_tokens:
            return stream
        added = {number: content for content, number in self._tokenizer.get_added_vocab().items()}
        return UnspacedStream(stream, added, prompt)

    def longest_token(self) -> int | None:
        return None

    def serialized(self) -> str:
        raise structured_outputs_error(
            f"needs a tokenizer.json; {type(self._tokenizer).__name__} can't be written as one"
        )


def _inner_text(tokenizer: Tokenizer, token: int) -> str:
    """Return the text of a token inside a text: of two in a row the second keeps its space."""
    first = tokenizer.decode([token], skip_special_tokens=False)
    return tokenizer.decode([token, token], skip_special_tokens=False)[len(first) :]


def _inner_bytes(tokenizer: Tokenizer, token: int, entry: str | bytes) -> bytes:
    """Return the bytes of a token inside a text; `entry` is the token as the vocabulary writes it."""
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
    """Return whether the folder has GPT-2's byte-level vocabulary; other tokenizers have files of these names, too."""
    kind = config.get("tokenizer_class")
    if kind is None:
        model = read_json(folder / "config.json")
        kind = model.get("tokenizer_class") or {"gpt2": "GPT2Tokenizer"}.get(str(model.get("model_type")))
    return kind in ("GPT2Tokenizer", "GPT2TokenizerFast") and all(
        (folder / name).exists() for name in ("vocab.json", "merges.txt")
    )


def _from_vocabulary(folder: Path, config: dict[str, Any]) -> FastTokenizer:
    """Read vocab.json and merges.txt as transformers' GPT2Tokenizer does."""
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
    """Add the tokens that only tokenizer_config.json names, in transformers' order.

    Raises:
        CheckpointError: the file is not of the form that transformers writes.
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
    """Return the added tokens that have ids: those of `added_tokens_decoder`, or of the older added_tokens.json."""
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
        # Never run code that came with a checkpoint; None would ask at the terminal.
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
    """Return the packages that the folder's tokenizer needs: package -> module."""
    found = {"transformers": "transformers"}
    if any((folder / name).exists() for name in _SENTENCEPIECE):
        found |= {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
    if any(folder.glob("*.tiktoken")) or (folder / "tekken.json").exists():
        found["tiktoken"] = "tiktoken"
    return found


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even its parent package
        return False
