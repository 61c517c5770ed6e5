"""The text of a growing output: it is the same for all sizes of updates, and ends at the first completed stop text."""

import tracemalloc
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from transformers import PreTrainedTokenizerFast

from shoal.launch.hub import BUNDLED
from shoal.text.detokenizer import OutputText
from shoal.text.stop_texts import StopTexts
from shoal.text.text_stream import ByteStream, FallbackStream, RedecodingStream, TextStream
from shoal.text.tokenizer import FastTokenizer, SlowTokenizer, Tokenizer, open_tokenizer
from support import tokenizers as made
from support.fakes import steady


class Bytes:
    """A fake transformers tokenizer for `SlowTokenizer`: each token is a byte, and 256 is a special token."""

    all_special_ids = (256,)

    def __len__(self) -> int:
        return 257

    def __call__(self, text: str, *, add_special_tokens: bool) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[*text.encode()])

    def get_added_vocab(self) -> dict[str, int]:
        return {"<e>": 256}

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        assert not clean_up_tokenization_spaces
        assert all(token < len(self) for token in tokens), "an unknown id, for which a real library fails"
        parts = [b"<e>" if token == 256 else bytes([token]) if token < 256 else b"" for token in tokens]
        return b"".join(p for p in parts if p != b"<e>" or not skip_special_tokens).decode("utf-8", "replace")


@cache
def tokenizer(name: str) -> Tokenizer:
    if name == "bundled":
        found = open_tokenizer(BUNDLED)
        assert found is not None
        return found
    if name == "slow":
        return SlowTokenizer(Bytes())
    library = made.byte_fallback(strip=False) if name == "byte_fallback_2" else getattr(made, name)()
    return FastTokenizer(library)


KINDS: dict[str, tuple[int, type]] = {  # (number of ids to draw from, a few of them unknown; class of the stream)
    "bundled": (645, ByteStream),
    "byte_fallback": (280, FallbackStream),
    "byte_fallback_2": (280, FallbackStream),
    "word_pieces": (10, RedecodingStream),
    "metaspace": (11, RedecodingStream),
    "suffixed": (8, RedecodingStream),
    "undecoded": (6, RedecodingStream),
    "slow": (258, RedecodingStream),
}
KIND = pytest.mark.parametrize("kind", KINDS)


def tokens_of(kind: str, *, min_size: int = 0, max_size: int) -> st.SearchStrategy[list[int]]:
    """Draw any tokens, with many difficult ones: parts of characters, special tokens, spaces."""
    hard = {
        "bundled": tokenizer("bundled").encode("日é🦊") + [0, 1],
        "byte_fallback": [*(3 + byte for byte in "日é".encode()), 0, 1, 2, 259, 265],
        "slow": [*"日é".encode(), 256],
    }
    ids = st.integers(0, KINDS[kind][0] - 1)
    special = hard.get(kind.removesuffix("_2"))
    return st.lists(ids | st.sampled_from(special) if special else ids, min_size=min_size, max_size=max_size)


def fallback_id(token: str) -> int:
    found = made.byte_fallback().token_to_id(token)
    assert found is not None
    return found


def read(stream: TextStream, tokens: Sequence[int]) -> str:
    return "".join([*(stream.push(token) for token in tokens), stream.flush()])


SPACED = ["word_pieces", "undecoded"]  # kinds whose decoders put spaces between special tokens


def library_of(kind: str) -> Library:
    """Return a library object with a special token, for both FastTokenizer and transformers."""
    if kind == "bundled":
        return Library.from_file(str(BUNDLED / "tokenizer.json"))
    found: Library = made.byte_fallback(strip=False) if kind == "byte_fallback_2" else getattr(made, kind)()
    if not found.get_added_tokens_decoder():
        found.add_special_tokens(["<s>"])
    return found


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"slow"}))
def test_spaces_between_special_tokens_are_those_of_transformers(kind: str) -> None:
    """Without them, only spaces between tokens that were added to the vocabulary are left out, as in vLLM."""
    library = library_of(kind)
    added = library.get_added_tokens_decoder()
    special = min(added)
    first, *others = [token for token in range(library.get_vocab_size()) if token not in added][-3:]
    tokens = [special, first, *others, special, special, special, first, special]
    reference = PreTrainedTokenizerFast(tokenizer_object=library)
    whole = reference.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    found = FastTokenizer(library)
    assert read(found.stream([], skip_special_tokens=False), tokens) == whole
    name = added[special].content
    unspaced = whole.replace(f"{name} {name} {name}", name * 3)
    stream = found.stream([], skip_special_tokens=False, spaces_between_special_tokens=False)
    assert read(stream, tokens) == unspaced
    assert (unspaced != whole) == (kind in SPACED)
    without = reference.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert read(found.stream([], spaces_between_special_tokens=False), tokens) == without


def test_spaces_are_left_out_with_a_tokenizer_written_in_python() -> None:
    stream = tokenizer("slow").stream([97], skip_special_tokens=False, spaces_between_special_tokens=False)
    assert read(stream, [256, 256, 98, 256]) == "<e><e>b<e>"


def test_spaces_are_left_out_after_a_special_token_of_the_prompt() -> None:
    found = tokenizer("word_pieces")
    (special,) = found.special_ids
    for spaces, text in ((True, " [SEP] [SEP]"), (False, "[SEP][SEP]")):
        stream = found.stream([special], skip_special_tokens=False, spaces_between_special_tokens=spaces)
        assert read(stream, [special, special]) == text


@KIND
@steady
@given(st.data(), st.booleans())
def test_a_stream_gives_the_same_text_as_decoding_all_at_once(kind: str, data: st.DataObject, skip: bool) -> None:
    tokens = data.draw(tokens_of(kind, max_size=14))
    stream = tokenizer(kind).stream([], skip_special_tokens=skip)
    assert isinstance(stream, KINDS[kind][1])
    text, whole = read(stream, tokens), tokenizer(kind).decode(tokens, skip_special_tokens=skip)
    if isinstance(stream, FallbackStream):  # it keeps characters before an invalid byte; the library does not
        assert len(text) <= len(whole)
        assert text.replace("\ufffd", "") == whole or "\ufffd" in whole
        assert text.lstrip("\ufffd") or text == whole, "without a character in a run of bytes, both texts are equal"
    else:
        assert text == whole


def prompts_of(kind: str) -> st.SearchStrategy[list[int]]:
    """Draw tokens that end with a complete character."""
    if KINDS[kind][1] is FallbackStream:
        return st.lists(st.sampled_from([0, 1, 2, *range(259, 274)]), min_size=1, max_size=6)
    if kind in ("bundled", "slow"):
        return st.text("a é日🦊", min_size=1, max_size=4).map(tokenizer(kind).encode)
    return tokens_of(kind, min_size=1, max_size=6)


@KIND
@steady
@given(st.data())
def test_prompt_and_output_together_are_the_text_of_all_tokens(kind: str, data: st.DataObject) -> None:
    prompt = data.draw(prompts_of(kind))
    tokens = data.draw(tokens_of(kind, max_size=8))
    before, whole = tokenizer(kind).decode(prompt), tokenizer(kind).decode(prompt + tokens)
    text = before + read(tokenizer(kind).stream(prompt), tokens)
    assert text == whole or (KINDS[kind][1] is FallbackStream and "\ufffd" in whole)


@steady
@given(st.text("a é日🦊", min_size=1, max_size=12), st.data())
def test_a_text_may_be_split_anywhere_into_prompt_and_output(text: str, data: st.DataObject) -> None:
    """A character that is split belongs to the output."""
    tokens = tokenizer("bundled").encode(text)
    border = data.draw(st.integers(1, len(tokens)))
    before = tokenizer("bundled").decode(tokens[:border]).rstrip("\ufffd")
    assert before + read(tokenizer("bundled").stream(tokens[:border]), tokens[border:]) == text


@pytest.mark.parametrize("kind", ["bundled", "byte_fallback", "slow"])
def test_a_character_that_is_split_between_prompt_and_output_belongs_to_the_output(kind: str) -> None:
    if kind == "byte_fallback":
        tokens = [fallback_id(token) for token in ("a", "<0xE6>", "<0x97>", "<0xA5>", "b")]
    else:
        tokens = tokenizer(kind).encode("a日b", add_special_tokens=False)
    outputs = [read(tokenizer(kind).stream(tokens[:border]), tokens[border:]) for border in range(1, 5)]
    assert outputs == ["日b", "日b", "日b", "b"]


def test_a_first_space_is_kept_only_after_a_prompt_with_text() -> None:
    fox = fallback_id("▁fox")
    assert read(tokenizer("byte_fallback").stream([]), [fox]) == "fox"
    assert read(tokenizer("byte_fallback").stream([1]), [1, fox, fox]) == "fox fox", "<s> has no text"
    assert read(tokenizer("byte_fallback").stream([260]), [fox]) == " fox"


def test_text_is_shown_as_soon_as_it_is_certain() -> None:
    output = OutputText(tokenizer("bundled"), [])
    shown = []
    for token in tokenizer("bundled").encode("日é", add_special_tokens=False):
        output.append([token])
        shown.append(output.text)
    assert shown == ["", "", "日", "日", "日é"]


def test_an_incomplete_character_at_the_end_is_replaced() -> None:
    tokens = tokenizer("bundled").encode("é日")[:-1]
    output = OutputText(tokenizer("bundled"), [])
    output.append(tokens)
    assert output.text == "é"
    assert output.finish() is None
    assert output.text == tokenizer("bundled").decode(tokens) == "é\ufffd"


STOPS = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3)


class Letters:
    """A tokenizer whose tokens are the pieces into which a text is cut."""

    special_ids = frozenset[int]()
    size = 0

    def __init__(self, text: str, cuts: Sequence[int]) -> None:
        borders = [0, *sorted(cuts), len(text)]
        self.pieces = [text[i:j] for i, j in pairwise(borders)]

    def stream(
        self, prompt: Sequence[int], *, skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> TextStream:
        return FallbackStream(lambda token: self.pieces[token], prompt, strip=0)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        raise NotImplementedError

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        raise NotImplementedError

    def token_text(self, token: int) -> str:
        raise NotImplementedError

    def token_bytes(self, token: int) -> bytes:
        raise NotImplementedError

    def longest_token(self) -> int | None:
        return None

    def serialized(self) -> str:
        raise NotImplementedError


def first_stop(text: str, stops: Sequence[str], floor: int) -> tuple[int, str] | None:
    """Try every position, and return (start, text) of the first stop text that ends after `floor` characters."""
    for end in range(floor + 1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return end - len(longest), longest
    return None


@steady
@given(st.text("abc", max_size=24), STOPS, st.data(), st.booleans(), st.integers(0, 4))
def test_the_first_stop_text_to_be_completed_ends_the_output(
    text: str, stops: list[str], data: st.DataObject, include: bool, min_tokens: int
) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=12))
    letters = Letters(text, cuts)
    output = OutputText(letters, [], stop=StopTexts(stops), include_stop=include, min_tokens=min_tokens)
    shown = [""]
    for token in range(len(letters.pieces)):
        output.append([token])
        shown.append(output.text)
    stopped = output.finish()
    found = first_stop(text, stops, len("".join(letters.pieces[:min_tokens])))
    if found is None:
        assert (stopped, output.text, output.num_tokens) == (None, text, len(letters.pieces))
    else:
        start, stop = found
        end = start + len(stop)
        assert (stopped, output.text) == (stop, text[:end] if include else text[:start])
        completed = next(n for n in range(len(letters.pieces) + 1) if len("".join(letters.pieces[:n])) >= end)
        assert output.num_tokens == completed
    assert all(output.text.startswith(early) for early in shown), "text that had been shown was changed later"
    if found is None and not include:
        held = [len("".join(letters.pieces[:n])) - len(early) for n, early in enumerate(shown)]
        assert max(held) < max(map(len, stops)), "more text was held back than the longest stop text has"


@steady
@given(st.text("ab", max_size=20), st.text("ab", min_size=1, max_size=3), st.data())
def test_a_single_stop_text_is_found_at_the_position_of_str_find(text: str, stop: str, data: st.DataObject) -> None:
    letters = Letters(text, data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    output = OutputText(letters, [], stop=StopTexts([stop]))
    tokens = list(range(len(letters.pieces)))
    while tokens:
        size = data.draw(st.integers(1, len(tokens)))
        output.append(tokens[:size])
        tokens = tokens[size:]
    output.finish()
    at = text.find(stop)
    assert output.text == (text if at < 0 else text[:at])


def test_memory_for_a_long_stop_text_is_proportional_to_its_length() -> None:
    """A table of all its prefixes would take 48 MiB. All outputs of a request share the automaton."""
    long = "".join(chr(97 + i * i % 23) for i in range(10_000))
    letters = Letters(f"{long[:9000]}!{long}", list(range(9000, 19_001, 100)))
    tracemalloc.start()
    try:
        texts = StopTexts([long])
        outputs = [OutputText(letters, [], stop=texts) for _ in range(20)]
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used < 3_000_000, "about 200 bytes per character once, and a few objects for each output"
    assert outputs[0].append(range(len(letters.pieces))) == long
    assert outputs[0].text == f"{long[:9000]}!"
    assert outputs[1].append([0]) is None
    assert outputs[1].text == "", "the whole text may be the beginning of the stop text"


def test_a_possible_beginning_of_a_stop_text_is_held_back_until_more_text_comes() -> None:
    letters = Letters("one\n\nUsual", [3, 4, 5, 6])
    output = OutputText(letters, [], stop=StopTexts(["\n\nUser:"]))
    shown = []
    for token in range(5):
        output.append([token])
        shown.append(output.text)
    assert shown == ["one", "one", "one", "one", "one\n\nUsual"]


def test_text_that_is_held_back_is_shown_at_the_end() -> None:
    output = OutputText(Letters("one\n", [3]), [], stop=StopTexts(["\n\n"]))
    output.append([0, 1])
    assert output.text == "one"
    assert output.finish() is None
    assert output.text == "one\n"


def test_tokens_after_a_stop_text_are_ignored() -> None:
    output = OutputText(Letters("a.b.", [1, 2, 3]), [], stop=StopTexts(["."]))
    assert output.append([0, 1, 2, 3]) == "."
    assert output.append([0]) == "."
    assert (output.text, output.num_tokens, output.stopped, output.finish()) == ("a", 2, ".", ".")


def test_a_replacement_character_at_the_end_may_complete_a_stop_text() -> None:
    output = OutputText(tokenizer("byte_fallback"), [], stop=StopTexts(["\ufffd"]))
    assert output.append([3 + byte for byte in "aé".encode()[:-1]]) is None
    assert output.finish() == "\ufffd"
    assert output.text == "a"


@pytest.mark.parametrize(
    ("run", "text"),
    [
        ("日é".encode(), "日é"),
        (b"\xff\xfe", "\ufffd" * 2),
        ("日".encode()[:2], "\ufffd" * 2),
        ("日".encode() + b"\xff", "日\ufffd"),  # decoded at once, it would become four replacement characters
        (b"\xe6\x97\x0a", "\ufffd\ufffd\n"),  # decoded at once, it would become three replacement characters
    ],
)
def test_runs_of_byte_tokens_become_characters(run: bytes, text: str) -> None:
    tokens = [3 + byte for byte in run]
    fox = fallback_id("fox")
    assert read(tokenizer("byte_fallback").stream([]), [*tokens, fox]) == f"{text}fox"
    whole = tokenizer("byte_fallback").decode([*tokens, fox])
    assert whole == f"{text}fox" or whole == "\ufffd" * len(run) + "fox"


def test_a_line_break_as_a_byte_token_ends_an_output_at_once() -> None:
    output = OutputText(tokenizer("byte_fallback"), [], stop=StopTexts(["\n"]))
    assert output.append([3 + 0x0A]) == "\n"


def test_time_for_long_outputs_is_proportional_to_their_length() -> None:
    """Each call decodes a new token and the token before it, but not the whole output."""
    calls = []

    def decode(tokens: Sequence[int]) -> str:
        calls.append(len(tokens))
        return "x" * len(tokens)

    stream = RedecodingStream(decode, [])
    assert read(stream, range(1000)) == "x" * 1000
    assert max(calls) <= 2
