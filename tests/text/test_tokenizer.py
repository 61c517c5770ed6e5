"""Encoding and decoding with the tokenizers of all kinds of checkpoints."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Library

from shoal.errors import CheckpointError, ConfigError, RequestError
from shoal.launch.hub import BUNDLED
from shoal.text.tokenizer import FastTokenizer, SlowTokenizer, Tokenizer, open_other_tokenizer, open_tokenizer
from support import tokenizers as made

TEXTS = [
    "",
    "Hello world, it's the fox's 12 dogs!",
    "  two spaces, \t tab\n\nand lines ",
    "日本語 🦊 é é \u200b",
    "a</s>b <|endoftext|> <|im_start|> <|one|><|two|> <tool>  x <pad>",
]


def opened(folder: Path) -> Tokenizer:
    found = open_tokenizer(folder)
    assert found is not None
    return found


def transformers_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("make", [made.opt, made.gpt2, made.gpt2_listed])
def test_vocab_and_merges_give_the_tokens_of_transformers(
    make: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path)
    expected = transformers_tokenizer(folder)
    with monkeypatch.context() as patch:
        patch.setattr("shoal.text.tokenizer.load", None)  # this tokenizer must not need transformers
        tokenizer = opened(folder)
    for text in TEXTS:
        for special in (True, False):
            tokens = tokenizer.encode(text, add_special_tokens=special)
            assert tokens == expected(text, add_special_tokens=special).input_ids
            for skip in (True, False):
                assert tokenizer.decode(tokens, skip_special_tokens=skip) == expected.decode(
                    tokens, skip_special_tokens=skip
                )
    assert tokenizer.special_ids == set(expected.all_special_ids)


def test_opt_begins_texts_with_its_end_of_text_token(tmp_path: Path) -> None:
    assert opened(made.opt(tmp_path)).encode("a")[0] == 2


@pytest.mark.parametrize("add_bos_token", [True, False, None])
@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "GPT2Tokenizer"])
def test_a_tokenizer_json_decides_which_tokens_surround_a_text(
    kind: str, add_bos_token: bool | None, tmp_path: Path
) -> None:
    """As in transformers, add_bos_token has no effect then, and tokens in tokenizer_config.json alone are added."""
    config = {"tokenizer_class": kind, "bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}
    if add_bos_token is not None:
        config["add_bos_token"] = add_bos_token  # type: ignore[assignment]
    listed = {"360": {"content": "<tool>", "special": False}, "361": {"content": "<s>", "special": True}}
    made.write(tmp_path, {"tokenizer_config.json": config | {"added_tokens_decoder": listed}})
    made.byte_level(("<unk>",)).save(str(tmp_path / "tokenizer.json"))
    tokenizer, expected = opened(tmp_path), transformers_tokenizer(tmp_path)
    for text in ["<s>Hello <tool> world<|im_end|>", "plain"]:
        assert tokenizer.encode(text) == expected(text).input_ids
    assert tokenizer.special_ids == set(expected.all_special_ids)


def test_other_tokenizers_without_a_tokenizer_json_come_from_transformers(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "##s", "world"]
    config = {"tokenizer_class": "BertTokenizer"}
    made.write(tmp_path, {"vocab.txt": "\n".join(words), "tokenizer_config.json": config, "config.json": {}})
    tokenizer = opened(tmp_path)
    assert tokenizer.encode("hellos world") == [2, 5, 6, 7, 3]
    assert tokenizer.decode([2, 5, 6, 7, 3]) == "hellos world"
    assert json.loads(tokenizer.serialized())["model"]["type"] == "WordPiece"


def slow(folder: Path) -> Tokenizer:
    """Return a tokenizer that is written in Python and needs no file; its tokens are bytes."""
    return opened(
        made.write(folder, {"tokenizer_config.json": {"tokenizer_class": "ByT5Tokenizer"}, "config.json": {}})
    )


def test_a_tokenizer_written_in_python_encodes_and_decodes(tmp_path: Path) -> None:
    tokenizer = slow(tmp_path)
    assert isinstance(tokenizer, SlowTokenizer)
    assert tokenizer.encode("a .", add_special_tokens=False) == [100, 35, 49]
    assert tokenizer.encode("a")[-1] in tokenizer.special_ids
    assert tokenizer.decode([100, 35, 49, 1]) == "a ."
    assert tokenizer.token_text(100) == "a"
    with pytest.raises(RequestError, match=r"needs a tokenizer\.json; ByT5Tokenizer can't"):
        tokenizer.serialized()


@pytest.mark.parametrize(
    ("file", "missing", "needed"),
    [
        ("tokenizer.model", ("sentencepiece", "google.protobuf"), "sentencepiece protobuf"),
        ("qwen.tiktoken", ("tiktoken",), "tiktoken"),
        ("vocab.txt", ("transformers",), "transformers"),
    ],
)
def test_a_missing_package_is_named(
    file: str, missing: tuple[str, ...], needed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else real(name))

    def refuse(path: str) -> Any:
        raise ImportError(path)

    monkeypatch.setattr("shoal.text.tokenizer.load", refuse)
    made.write(tmp_path, {file: "x"})
    with pytest.raises(CheckpointError, match=f"its tokenizer needs `pip install .*{needed}`"):
        open_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer.json": "{"}, "tokenizer.json can't be read"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": "[]"}, "tokenizer_config.json is not a JSON object"),
        ({"tokenizer_config.json": "{"}, "tokenizer_config.json can't be read"),
        (
            {"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"}, "vocab.json": "[", "merges.txt": ""},
            "merges",
        ),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"x": {}}}, "tokenizer.json": None}, "its tokens can't"),
        ({"tokenizer_config.json": {"eos_token": 7}, "tokenizer.json": None}, "its tokens can't be read"),
        ({"vocab.json": "{}"}, "the tokenizer can't be read"),
    ],
)
def test_broken_files_are_named(files: dict[str, Any], expected: str, tmp_path: Path) -> None:
    good = made.byte_level().to_str()
    made.write(tmp_path, {name: good if content is None else content for name, content in files.items()})
    with pytest.raises(CheckpointError, match=expected) as caught:
        open_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_tokenizer_files_gives_none(tmp_path: Path) -> None:
    assert open_tokenizer(made.write(tmp_path, {"config.json": {}, "generation_config.json": {}})) is None


def test_the_tokenizer_of_another_folder_must_fit_the_model(tmp_path: Path) -> None:
    size = opened(BUNDLED).size
    for vocab_size in (size, size + 100):  # models may pad their vocabularies
        assert open_other_tokenizer(BUNDLED, vocab_size).size == size
    with pytest.raises(ConfigError, match=f"has token ids up to {size - 1}, the model only up to {size - 2}: choose"):
        open_other_tokenizer(BUNDLED, size - 1)
    with pytest.raises(ConfigError, match=r"has no tokenizer; it needs a tokenizer\.json"):
        open_other_tokenizer(tmp_path, size)


@pytest.mark.parametrize("make", [made.opt, made.gpt2, made.gpt2_listed])
def test_the_size_includes_added_tokens(make: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = make(tmp_path)
    assert opened(folder).size == max(transformers_tokenizer(folder).get_vocab().values()) + 1


def test_truncation_and_padding_in_the_file_are_ignored(tmp_path: Path) -> None:
    library = made.metaspace()
    library.enable_truncation(2)
    library.enable_padding(length=9)
    library.save(str(tmp_path / "tokenizer.json"))
    assert opened(tmp_path).encode("San is a city") == [2, 3, 4, 5]


def test_a_serialized_tokenizer_gives_the_same_tokens() -> None:
    tokenizer = opened(BUNDLED)
    again = Library.from_str(tokenizer.serialized())
    assert again.encode("Hello <|end|>").ids == tokenizer.encode("Hello <|end|>")


@pytest.mark.parametrize(
    ("library", "texts"),
    [
        (made.byte_level(("</s>",)), {"Ġthe": " the", "</s>": "</s>", "Ã": "\ufffd", "a": "a", "Ċ": "\n"}),
        (made.byte_fallback(), {"▁fox": " fox", "fox": "fox", "<0x0A>": "\n", "<0xE6>": "\ufffd", "</s>": "</s>"}),
        (made.word_pieces(), {"hello": " hello", "##s": "s", "[SEP]": " [SEP]"}),
        (made.metaspace(), {"▁city": " city", "!": "!"}),
    ],
    ids=["bytes", "fallback", "pieces", "metaspace"],
)
def test_a_single_token_has_its_text(library: Library, texts: dict[str, str]) -> None:
    tokenizer = FastTokenizer(library)
    for token, text in texts.items():
        number = library.token_to_id(token)
        if number is not None:  # the tiny vocabulary may lack this token
            assert tokenizer.token_text(number) == text
    assert tokenizer.token_text(100_000) == ""


def test_many_tokens_are_decoded_correctly() -> None:
    found = open_tokenizer(BUNDLED)
    assert found is not None
    tokens = found.encode("Count from 3 to 9: \u65e5\u672c " * 300)
    assert len(tokens) > 3000
    few = found.decode(tokens[:300])
    assert found.decode(tokens).startswith(few.rstrip("\ufffd"))
    assert found.decode(tokens) == "Count from 3 to 9: \u65e5\u672c " * 300
