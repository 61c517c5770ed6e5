"""The longest text of a single token. With it, a prompt that is far too long is refused without encoding it."""

import threading
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Library

from shoal.errors import RequestError
from shoal.launch.hub import BUNDLED
from shoal.params import SamplingParams
from shoal.text.prompts import PromptReader
from shoal.text.tokenizer import FastTokenizer, open_tokenizer
from support import tokenizers as made
from support.fakes import steady

BUNDLED_TOKENIZER = open_tokenizer(BUNDLED)
KNOWN = [BUNDLED_TOKENIZER, FastTokenizer(made.byte_level()), FastTokenizer(made.byte_fallback())]
texts = st.text(max_size=80) | st.text(alphabet=" \nthe<|eos>é日🦊", max_size=200)


@steady
@given(texts)
@example("The quick brown fox jumps over the lazy dog. " * 20)
@example("<|assistant|>" * 50)
@example("\n" * 200)
@example(" " * 200)
def test_no_text_has_fewer_tokens_than_the_longest_token_allows(text: str) -> None:
    for tokenizer in KNOWN:
        assert tokenizer is not None
        longest = tokenizer.longest_token()
        assert longest is not None
        assert len(text.encode()) <= longest * len(tokenizer.encode(text, add_special_tokens=False))


def byte_level_with(**parts: object) -> Library:
    library = made.byte_level()
    for name, part in parts.items():
        setattr(library, name, part)
    return library


def with_a_token_that_takes_spaces() -> Library:
    library = made.byte_level()
    library.add_tokens([AddedToken("<mask>", lstrip=True)])
    return library


def split_by(*steps: pre_tokenizers.PreTokenizer) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel()])


@pytest.mark.parametrize(
    "library",
    [
        with_a_token_that_takes_spaces(),
        made.word_pieces(),
        made.metaspace(),
        byte_level_with(normalizer=normalizers.NFC()),
        byte_level_with(normalizer=normalizers.Sequence([normalizers.Prepend("a"), normalizers.Strip()])),
        byte_level_with(normalizer=normalizers.Replace("  ", " ")),
        byte_level_with(normalizer=normalizers.Replace(Regex(" +"), " ")),
        byte_level_with(pre_tokenizer=split_by(pre_tokenizers.Split(" ", "removed"))),
        byte_level_with(pre_tokenizer=split_by(pre_tokenizers.Whitespace())),
        byte_level_with(pre_tokenizer=split_by(pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit()]))),
        byte_level_with(pre_tokenizer=pre_tokenizers.Digits()),
    ],
)
def test_there_is_no_limit_if_text_may_be_lost_or_merged(library: Library) -> None:
    assert FastTokenizer(library).longest_token() is None


def test_there_is_a_limit_after_steps_that_only_split_or_lengthen_a_text() -> None:
    steps = split_by(pre_tokenizers.Split(Regex("a+"), "isolated"), pre_tokenizers.Digits(individual_digits=True))
    library = byte_level_with(
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    )
    library.pre_tokenizer = steps
    assert FastTokenizer(library).longest_token() == FastTokenizer(made.byte_level()).longest_token()


def test_a_prompt_that_can_not_fit_is_refused_without_being_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert BUNDLED_TOKENIZER is not None
    reader = PromptReader(BUNDLED_TOKENIZER, vocab_size=640, max_model_len=1024)
    monkeypatch.setattr(type(BUNDLED_TOKENIZER), "encode", None)
    with pytest.raises(
        RequestError, match=r"length is 1024 tokens; the prompt has 1000000 characters, more than that many"
    ):
        reader.prepare(0, "a" * 1_000_000, SamplingParams())


def test_encoding_a_long_text_does_not_block_other_threads() -> None:
    """One of the other threads runs the event loop."""
    assert BUNDLED_TOKENIZER is not None
    lasted = 0.0
    done = threading.Event()

    def cut_text() -> None:
        nonlocal lasted
        begun = time.monotonic()
        BUNDLED_TOKENIZER.encode("hello world " * 40_000)
        lasted = time.monotonic() - begun
        done.set()

    turns = 0
    thread = threading.Thread(target=cut_text)
    thread.start()
    while not done.is_set():
        turns += 1
        done.wait(0.001)
    thread.join()
    assert turns > 10, f"the other thread had only {turns} turns in {lasted:.3f} s"
