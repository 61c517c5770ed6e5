"""Offsets and bytes of tokens: together the bytes are the text, even if a character is split over tokens."""

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from shoal.launch.hub import BUNDLED
from shoal.llm.outputs import Completion, text_context
from shoal.openai.answers import chat_choice, completion_choice
from shoal.outputs import CompletionOutput
from shoal.params import SamplingParams
from shoal.server.api.token_positions import TokenPositions
from shoal.text.prompts import Job
from shoal.text.token_offsets import prompt_offsets, prompt_text
from shoal.text.tokenizer import FastTokenizer, SlowTokenizer, Tokenizer, open_tokenizer
from shoal.wire.engine import Finish, SeqUpdate
from shoal.wire.ranks import TokenLogprobs
from support import tokenizers as made
from support.fakes import steady

STOP = Finish.STOP


class Bytes:
    """A fake transformers tokenizer for `SlowTokenizer`: each token is a byte, and 256 is a special token."""

    all_special_ids = (256,)

    def __len__(self) -> int:
        return 257

    def __call__(self, text: str, *, add_special_tokens: bool) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[*text.encode()])

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool, **_: object) -> str:
        parts = [b"" if skip_special_tokens and token == 256 else self.part(token) for token in tokens]
        return b"".join(parts).decode("utf-8", "replace")

    def part(self, token: int) -> bytes:
        return b"<e>" if token == 256 else bytes([token])

    def convert_ids_to_tokens(self, token: int) -> str:
        return "<e>" if token == 256 else f"<0x{token:02X}>"


@cache
def tokenizer(kind: str) -> Tokenizer:
    if kind == "bundled":
        found = open_tokenizer(BUNDLED)
        assert found is not None
        return found
    if kind == "slow":
        return SlowTokenizer(Bytes())
    if kind == "byte_level":
        return FastTokenizer(made.byte_level(("<|end|>",)))
    return FastTokenizer(made.byte_fallback(strip=False) if kind == "byte_fallback_2" else getattr(made, kind)())


OF_BYTES = ("bundled", "byte_level", "byte_fallback", "byte_fallback_2", "odd_fallback", "slow")
OF_WORDS = {"word_pieces": 8, "metaspace": 9, "suffixed": 6, "undecoded": 4}  # kind -> number of ids
TEXTS = st.text(st.characters(codec="utf-8") | st.sampled_from("a é日🦊\u0301\ufeff"), max_size=24)


def completed(
    kind: str, prompt: Sequence[int], tokens: Sequence[int], *, end: Sequence[int] = (), **params: Any
) -> CompletionOutput:
    """Return the output for `tokens` that came one by one. The last one ends the text if it is one of `end`."""
    job = Job(0, None, tuple(prompt), SamplingParams(logprobs=1, **params))
    of = Completion(job, 0, tokenizer(kind), frozenset(end), text_context(tokenizer(kind), job))
    for token in tokens:
        finish = STOP if token in end else None
        if of.take(SeqUpdate(0, (token,), finish=finish, logprobs=(known(token),))):
            break
    return of.output()


def known(token: int) -> TokenLogprobs:
    return TokenLogprobs(-1.0, 1, (token, 0), (-1.0, -2.0))


def bytes_of(output: CompletionOutput) -> list[bytes]:
    content = chat_choice(output, 1)["logprobs"]["content"]
    assert [each["bytes"] for each in content] == [each["top_logprobs"][0]["bytes"] for each in content]
    return [bytes(each["bytes"]) for each in content]


def check_offsets(output: CompletionOutput) -> None:
    offsets = completion_choice(output)["logprobs"]["text_offset"]
    assert all(a <= b for a, b in pairwise(offsets))
    before = b""
    for offset, own in zip(offsets, bytes_of(output), strict=True):
        assert offset == len(before.decode("utf-8", "ignore")), (
            "the offset is not the number of complete characters before the token"
        )
        before += own
    assert all(0 <= offset <= len(output.text) for offset in offsets)


@pytest.mark.parametrize("kind", OF_BYTES)
@steady
@given(TEXTS, st.data())
def test_the_bytes_of_all_tokens_are_the_text(kind: str, text: str, data: st.DataObject) -> None:
    tokens = tokenizer(kind).encode(text, add_special_tokens=False)
    prompt = tokenizer(kind).encode(data.draw(st.sampled_from(["", "a", "é"])))
    output = completed(kind, prompt, tokens)
    assert b"".join(bytes_of(output)) == output.text.encode()
    if kind not in ("byte_fallback", "odd_fallback", "byte_fallback_2"):  # these kinds put a space before a text
        assert output.text == text
    check_offsets(output)


@pytest.mark.parametrize("kind", OF_WORDS)
@steady
@given(st.data(), st.booleans())
def test_the_bytes_of_words_are_the_text(kind: str, data: st.DataObject, skip: bool) -> None:
    ids = st.lists(st.integers(0, OF_WORDS[kind] - 1), max_size=8)
    output = completed(kind, data.draw(ids), data.draw(ids), skip_special_tokens=skip)
    assert b"".join(bytes_of(output)) == output.text.encode()
    check_offsets(output)


@pytest.mark.parametrize("kind", ["bundled", "byte_level", "byte_fallback", "odd_fallback", "slow"])
def test_a_part_of_a_character_is_shown_with_its_bytes_in_openais_form(kind: str) -> None:
    tokens = [*tokenizer(kind).encode("日", add_special_tokens=False)][-3:]
    if kind == "bundled":
        tokens = [tokenizer(kind).encode("日", add_special_tokens=False)[0]]
    output = completed(kind, [], tokens[:1])
    (first,) = chat_choice(output, 1)["logprobs"]["content"]
    (legacy,) = completion_choice(output)["logprobs"]["tokens"]
    own = bytes(first["bytes"])
    assert own
    assert "日".encode().startswith(own)
    assert own != "日".encode()
    name = "".join(f"\\x{byte:02x}" for byte in own)
    assert (first["token"], legacy) == (name, f"bytes:{name}")


def test_an_incomplete_character_at_the_end_has_its_own_byte() -> None:
    """The text has a replacement character in its place."""
    tokens = tokenizer("slow").encode("a日")[:2]
    output = completed("slow", [], tokens)
    assert output.text == "a\ufffd"
    assert bytes_of(output) == [b"a", b"\xe6"]


def test_a_character_that_the_prompt_begins_belongs_to_the_output() -> None:
    tokens = tokenizer("slow").encode("日b")
    output = completed("slow", tokens[:1], tokens[1:])
    assert (output.text, output.text_offsets) == ("日b", (0, 0, 1))
    assert bytes_of(output) == [b"\x97", b"\xa5", b"b"]


def test_a_token_without_text_in_the_output_adds_no_bytes() -> None:
    tokens = [*"é".encode(), 256]
    left_out = completed("slow", [97], tokens, end=(256,))
    assert (left_out.text, left_out.text_offsets, bytes_of(left_out)) == ("é", (0, 0, 1), [b"\xc3", b"\xa9", b""])
    assert chat_choice(left_out, 1)["logprobs"]["content"][-1]["token"] == "<e>"
    shown = completed("slow", [97], tokens, skip_special_tokens=False)
    assert (shown.text, shown.text_offsets, bytes_of(shown)[-1]) == ("é<e>", (0, 0, 1), b"<e>")


@pytest.mark.parametrize(("include", "text", "offsets"), [(False, "é", (0, 0, 1, 1)), (True, "éab", (0, 0, 1, 2))])
def test_offsets_of_stop_text_tokens_are_within_the_text(include: bool, text: str, offsets: tuple[int, ...]) -> None:
    output = completed("slow", [97], [*"éabc".encode()], stop=["ab"], include_stop_str_in_output=include)
    assert (output.text, output.text_offsets) == (text, offsets)


@steady
@given(st.text("aé日x", max_size=12), st.lists(st.integers(1, 4), min_size=1), st.booleans())
def test_offsets_in_a_stream_are_those_of_the_whole_answer(text: str, sizes: list[int], include: bool) -> None:
    params: dict[str, Any] = {"stop": ["xx", "日x"], "include_stop_str_in_output": include}
    tokens = [*text.encode()]
    expected = completed("slow", [97], tokens, **params)
    job = Job(0, None, (97,), SamplingParams(logprobs=0, **params))
    of = Completion(job, 0, tokenizer("slow"), frozenset(), text_context(tokenizer("slow"), job))
    waiting, positions, sent = TokenPositions(), [], ""
    for part, last in in_parts(tokens, sizes):
        stopped = of.take(SeqUpdate(0, tuple(part), logprobs=tuple(map(known, part))))
        delta = of.delta(last=last or stopped)
        sent += delta.text
        positions += [(token, offset) for token, _, offset in waiting.take(delta)]
        assert all(offset <= len(sent) for _, offset in positions)
        if stopped:
            break
    assert sent == expected.text
    assert positions == list(zip(expected.token_ids, expected.text_offsets or (), strict=True))


def in_parts(tokens: Sequence[int], sizes: Sequence[int]) -> Iterator[tuple[Sequence[int], bool]]:
    start, turn = 0, 0
    while True:
        end = start + sizes[turn % len(sizes)]
        yield tokens[start:end], end >= len(tokens)
        if end >= len(tokens):
            return
        start, turn = end, turn + 1


# --- prompts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OF_BYTES)
@steady
@given(TEXTS)
def test_the_tokens_of_a_prompt_have_the_offsets_of_their_text(kind: str, text: str) -> None:
    """Special tokens and a leading space that the tokenizer adds are not counted as characters of the text."""
    assume(not text.startswith(" "))
    tokens = tokenizer(kind).encode(text)
    starts = prompt_offsets(tokenizer(kind), tokens, text)
    assert all(a <= b for a, b in pairwise([0, *starts, len(text)]))
    plain = [(at, token) for at, token in zip(starts, tokens, strict=True) if token not in tokenizer(kind).special_ids]
    before = b""
    for at, token in plain:
        assert at == len(before.decode("utf-8", "ignore"))
        own = tokenizer(kind).token_bytes(token)
        before += own if before else own.removeprefix(b" ")


@steady
@given(TEXTS, st.integers(0, 100))
def test_an_echoed_prompt_and_the_output_together_are_the_whole_text(text: str, cut: int) -> None:
    tokens = tokenizer("slow").encode(text)
    prompt, rest = tokens[:cut], tokens[cut:]
    echo = prompt_text(tokenizer("slow"), prompt)
    assert echo + completed("slow", prompt, rest).text == text
