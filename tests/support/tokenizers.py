"""Small tokenizers of all kinds that checkpoints have, with the files of the hub."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It isn't lazy, is it? 1234 times!",
    "Grüße aus Köln: naïve café, 日本語のテキスト, emoji 🦊🐕 and  double  spaces.",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))  # comment",
]


def write(folder: Path, files: Mapping[str, Any]) -> Path:
    """Write files: texts unchanged, everything else as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return folder


def byte_level(special: tuple[str, ...] = ()) -> Tokenizer:
    """A tokenizer like GPT-2's. It knows few characters beyond ASCII, so that most of them are split into bytes."""
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(CORPUS, trainer)
    return library


def write_byte_level(folder: Path, special: tuple[str, ...], files: Mapping[str, Any]) -> Path:
    """Write vocab.json and merges.txt, without a tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    byte_level(special).model.save(str(folder))
    return write(folder, files)


def opt(folder: Path) -> Path:
    """Write the files of facebook/opt-125m: </s> before every text, and no tokenizer.json."""
    token = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    end = token | {"content": "</s>"}
    config = {
        "errors": "replace",
        "unk_token": end,
        "bos_token": end,
        "eos_token": end,
        "pad_token": token | {"content": "<pad>"},
        "add_prefix_space": False,
        "add_bos_token": True,
        "tokenizer_class": "GPT2Tokenizer",
    }
    plain = {key: value for key, value in end.items() if key != "__type"}
    special = {"bos_token": plain, "eos_token": plain, "unk_token": plain, "pad_token": "<pad>"}
    files = {"tokenizer_config.json": config, "special_tokens_map.json": special, "config.json": {"model_type": "opt"}}
    return write_byte_level(folder, ("<s>", "<pad>", "</s>", "<unk>"), files)


def gpt2(folder: Path) -> Path:
    """Write files like the first ones of GPT-2: only config.json names the class; added tokens are in another file."""
    size = byte_level(("<|endoftext|>",)).get_vocab_size()
    files = {
        "config.json": {"model_type": "gpt2"},
        "added_tokens.json": {"<|two|>": size + 1, "<|one|>": size},
        "special_tokens_map.json": {"eos_token": "<|one|>", "bos_token": "<|endoftext|>"},
    }
    return write_byte_level(folder, ("<|endoftext|>",), files)


def gpt2_listed(folder: Path) -> Path:
    """Write files with `added_tokens_decoder`, as transformers does since 4.34."""
    size = byte_level(("<|endoftext|>",)).get_vocab_size()
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    listed = {
        "0": flags | {"content": "<|endoftext|>"},
        str(size): flags | {"content": "<|im_start|>"},
        str(size + 1): flags | {"content": "<tool>", "special": False, "rstrip": True},
    }
    config = {
        "added_tokens_decoder": listed,
        "additional_special_tokens": ["<|im_start|>"],
        "add_prefix_space": True,
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_start|>",
        "unk_token": "<|endoftext|>",
        "add_bos_token": False,
        "tokenizer_class": "GPT2TokenizerFast",
    }
    return write_byte_level(
        folder, ("<|endoftext|>",), {"tokenizer_config.json": config, "config.json": {"model_type": "gpt2"}}
    )


def byte_fallback(*, strip: bool = True) -> Tokenizer:
    """A tokenizer like Llama 2's: words with ▁ for a space, and bytes for the rest.

    `strip`: the first space of a text is removed.
    """
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["▁", "▁the", "▁fox", "fox", "▁is", "a", "b", "s", "t", "o", "p", ".", "▁▁", "é"]
    library = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [], byte_fallback=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    library.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if strip else [])])
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    library.add_tokens([AddedToken("<think>", normalized=False)])
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return library


def _words(words: list[str]) -> Tokenizer:
    return Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", *words])}, unk_token="<unk>"))


def word_pieces() -> Tokenizer:
    library = _words(["[SEP]", "hello", "##s", "world", ".", "n't", "##é"])
    library.decoder = decoders.WordPiece()
    library.add_special_tokens(["[SEP]"])
    return library


def metaspace() -> Tokenizer:
    library = _words(["</s>", "▁San", "▁is", "▁a", "▁city", "a", "!", "▁"])
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    library.add_special_tokens(["</s>"])
    return library


def suffixed() -> Tokenizer:
    library = _words(["he", "llo</w>", "world</w>", "!</w>", "</s>"])
    library.decoder = decoders.BPEDecoder()
    library.add_special_tokens(["</s>"])
    return library


def undecoded() -> Tokenizer:
    """A tokenizer without a decoder, whose tokens are words."""
    return _words(["a", "b", "c"])


def odd_fallback() -> Tokenizer:
    """A tokenizer whose byte fallback decoder has a step that only the library can do."""
    library = byte_fallback()
    steps = [decoders.Replace(Regex("▁"), " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    library.decoder = decoders.Sequence(steps)
    return library
