"""Text to tokens and back, with the kinds of tokenizers that checkpoints bring."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from shoal.frontend.hub import BUNDLED
from shoal.frontend.tokenizer import Tokenizer, continuation, eos_tokens, open_tokenizer

WORDS = ["<unk>", "▁San", "▁is", "▁a", "▁city", "a", "!"]


def sentencepiece_like(folder: Path) -> Tokenizer:
    """As Llama 2's: a text's first space is stripped when it is decoded."""
    library = Library(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    library.enable_truncation(2)
    library.enable_padding(length=9)
    library.save(str(folder / "tokenizer.json"))
    found = open_tokenizer(folder)
    assert found is not None
    return found


def test_a_continuation_keeps_its_first_space(tmp_path: Path) -> None:
    tokenizer = sentencepiece_like(tmp_path)
    prompt = tokenizer.encode("San is")
    assert continuation(tokenizer, prompt, [3, 4]) == " a city"
    assert continuation(tokenizer, prompt, [6]) == "!"
    assert continuation(tokenizer, prompt, []) == ""


def test_settings_left_in_the_file_neither_cut_nor_pad(tmp_path: Path) -> None:
    assert sentencepiece_like(tmp_path).encode("San is a city") == [1, 2, 3, 4]


@given(st.text(min_size=1, max_size=12), st.data())
def test_prompt_and_continuation_make_the_whole_text(text: str, data: st.DataObject) -> None:
    """Wherever the border lies; a character that it cuts belongs to the continuation."""
    tokenizer = open_tokenizer(BUNDLED)
    assert tokenizer is not None
    tokens = tokenizer.encode(text)
    border = data.draw(st.integers(1, len(tokens)))
    before = tokenizer.decode(tokens[:border]).rstrip("\ufffd")
    assert before + continuation(tokenizer, tokens[:border], tokens[border:]) == tokenizer.decode(tokens)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, ()),
        ({"config.json": '{"eos_token_id": 2}'}, (2,)),
        ({"generation_config.json": '{"eos_token_id": [3, 2]}', "config.json": '{"eos_token_id": 2}'}, (3, 2)),
        ({"generation_config.json": "[]", "config.json": "{"}, ()),
    ],
)
def test_eos_tokens(files: dict[str, str], expected: tuple[int, ...], tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert eos_tokens(tmp_path) == expected
