"""Streamed answers, which may come in any pieces, and the times of their chunks."""

import contextlib
import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.client.load.streamed_answer import BrokenAnswer, StreamedAnswer
from support.fakes import steady


def event(value: Any, end: str = "\n") -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False)}{end}{end}".encode()


def text(value: str, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": value, "finish_reason": finish}]}


def chat(**delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}


USAGE = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5}}


def test_times_of_chunks() -> None:
    """There are five tokens in three chunks, and two of these come together."""
    answer = StreamedAnswer()
    answer.feed(event(chat(role="assistant", content="")), 1.0)
    answer.feed(event(chat(content="a")), 2.0)
    answer.feed(event(chat(content="b")) + event(chat(content="cde")), 5.0)
    answer.feed(event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}), 6.0)
    answer.feed(event(USAGE) + b"data: [DONE]\n\n", 7.0)
    answer.close(8.0)
    assert (answer.first, answer.last, answer.stopped) == (2.0, 5.0, 6.0)
    assert (list(answer.gaps), answer.chunks) == ([3.0, 0.0], 3)
    assert (answer.prompt_tokens, answer.output_tokens, answer.finish_reason) == (7, 5, "stop")


@steady
@given(st.lists(st.text(max_size=5), max_size=8), st.sampled_from(["\n", "\r\n"]), st.data())
def test_an_answer_may_be_cut_into_any_pieces(texts: list[str], end: str, data: st.DataObject) -> None:
    """It may be cut inside a character, too. Comments and other fields are ignored."""
    whole = f": ping{end}{end}event: x{end}".encode()
    whole += b"".join(event(text(each), end) for each in texts)
    whole += event(text("", "length"), end) + event(USAGE, end) + f"data: [DONE]{end}{end}".encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=20)))
    answer = StreamedAnswer()
    for now, (begin, stop) in enumerate(itertools.pairwise([0, *cuts, len(whole)])):
        answer.feed(whole[begin:stop], float(now))
    answer.close(99.0)
    assert answer.chunks == sum(bool(each) for each in texts)
    assert (answer.prompt_tokens, answer.output_tokens) == (7, 5)
    if answer.last is not None and answer.first is not None:
        assert sum(answer.gaps) == answer.last - answer.first
    else:
        assert answer.first == 99.0 or not any(texts)


@pytest.mark.parametrize(
    "delta",
    [{"content": "a"}, {"reasoning_content": "a"}, {"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]}],
)
def test_deltas_that_count_as_text(delta: dict[str, Any]) -> None:
    answer = StreamedAnswer()
    answer.feed(event(chat(**delta)), 1.0)
    assert answer.chunks == 1


def test_a_data_field_on_several_lines() -> None:
    answer = StreamedAnswer()
    answer.feed(b'data: {"choices":\ndata: [{"text": "a"}]}\n\n', 1.0)
    assert answer.chunks == 1


def test_a_stream_that_ends_early() -> None:
    answer = StreamedAnswer()
    answer.feed(event(text("a")), 1.0)
    with pytest.raises(BrokenAnswer, match="after 1 chunks, before the answer"):
        answer.close(2.0)


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_a_dropped_request_is_a_broken_answer(reason: str) -> None:
    answer = StreamedAnswer()
    answer.feed(event(text("", reason)) + b"data: [DONE]\n\n", 1.0)
    with pytest.raises(BrokenAnswer, match=f"ended it after 0 chunks: {reason}") as raised:
        answer.close(2.0)
    assert raised.value.kind == "broken off"


def test_an_answer_needs_a_choice() -> None:
    answer = StreamedAnswer()
    answer.feed(b"data: [DONE]\n\n", 1.0)
    with pytest.raises(BrokenAnswer, match="before the answer"):
        answer.close(2.0)


@pytest.mark.parametrize(
    ("usage", "counts"),
    [
        ({"prompt_tokens": 7}, (7, None)),
        ({"completion_tokens": 5}, (None, 5)),
        ({"prompt_tokens": 7, "completion_tokens": None}, (7, None)),
    ],
)
def test_servers_that_count_only_one_kind_of_tokens(
    usage: dict[str, Any], counts: tuple[int | None, int | None]
) -> None:
    answer = StreamedAnswer()
    answer.feed(event({"choices": [], "usage": usage}), 1.0)
    assert (answer.prompt_tokens, answer.output_tokens) == counts


def test_tokens_without_text() -> None:
    answer = StreamedAnswer()
    answer.feed(event(text("", "stop")) + event(USAGE), 1.0)
    answer.close(2.0)
    assert answer.first == 2.0


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (b'data: {"error": {"message": "out of blocks"}}\n\n', "error in stream"),
        (b"data: {\n\n", "broken stream"),
        (b"data: 5\n\n", "broken stream"),
        (b"data: [1]\n\n", "broken stream"),
        (b'data: {"choices": [1]}\n\n', "broken stream"),
        (b'data: {"choices": [{"delta": "x"}]}\n\n', "broken stream"),
        (b'data: {"usage": {"x": 1}}\n\n', "broken stream"),
        (b'data: "\xff"\n\n', "broken stream"),
    ],
)
def test_broken_answers(value: bytes, kind: str) -> None:
    with pytest.raises(BrokenAnswer) as raised:
        StreamedAnswer().feed(value, 1.0)
    assert raised.value.kind == kind
    assert "\n" not in str(raised.value)
    assert kind == "broken stream" or str(raised.value) == "out of blocks"


@steady
@given(st.binary(max_size=60))
def test_any_bytes_raise_only_broken_answer(noise: bytes) -> None:
    with contextlib.suppress(BrokenAnswer):
        StreamedAnswer().feed(b"data:" + noise + b"\n\n", 0.0)
