"""Reading answers: the same whatever the pieces in which they come, and timed as they came."""

import contextlib
import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.client.load.stream import BadStream, Tally
from support.fakes import steady


def event(value: Any, end: str = "\n") -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False)}{end}{end}".encode()


def text(value: str, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": value, "finish_reason": finish}]}


def chat(**delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}


USAGE = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5}}


def test_times() -> None:
    """Five tokens in three chunks, of which two come together."""
    tally = Tally()
    tally.feed(event(chat(role="assistant", content="")), 1.0)
    tally.feed(event(chat(content="a")), 2.0)
    tally.feed(event(chat(content="b")) + event(chat(content="cde")), 5.0)
    tally.feed(event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}), 6.0)
    tally.feed(event(USAGE) + b"data: [DONE]\n\n", 7.0)
    tally.close(8.0)
    assert (tally.first, tally.last, tally.stopped) == (2.0, 5.0, 6.0)
    assert (list(tally.gaps), tally.chunks) == ([3.0, 0.0], 3)
    assert (tally.prompt, tally.output, tally.finish_reason) == (7, 5, "stop")


@steady
@given(st.lists(st.text(max_size=5), max_size=8), st.sampled_from(["\n", "\r\n"]), st.data())
def test_pieces_do_not_matter(texts: list[str], end: str, data: st.DataObject) -> None:
    """Cut anywhere, inside a character too; comments and other fields are passed over."""
    whole = f": ping{end}{end}event: x{end}".encode()
    whole += b"".join(event(text(each), end) for each in texts)
    whole += event(text("", "length"), end) + event(USAGE, end) + f"data: [DONE]{end}{end}".encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=20)))
    tally = Tally()
    for now, (begin, stop) in enumerate(itertools.pairwise([0, *cuts, len(whole)])):
        tally.feed(whole[begin:stop], float(now))
    tally.close(99.0)
    assert tally.chunks == sum(bool(each) for each in texts)
    assert (tally.prompt, tally.output) == (7, 5)
    if tally.last is not None and tally.first is not None:
        assert sum(tally.gaps) == tally.last - tally.first
    else:
        assert tally.first == 99.0 or not any(texts)


@pytest.mark.parametrize(
    "delta",
    [{"content": "a"}, {"reasoning_content": "a"}, {"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]}],
)
def test_what_counts_as_text(delta: dict[str, Any]) -> None:
    tally = Tally()
    tally.feed(event(chat(**delta)), 1.0)
    assert tally.chunks == 1


def test_a_data_field_on_several_lines() -> None:
    tally = Tally()
    tally.feed(b'data: {"choices":\ndata: [{"text": "a"}]}\n\n', 1.0)
    assert tally.chunks == 1


def test_a_stream_that_ends_early() -> None:
    tally = Tally()
    tally.feed(event(text("a")), 1.0)
    with pytest.raises(BadStream, match="after 1 chunks, without an end"):
        tally.close(2.0)


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_what_the_server_has_dropped_is_no_answer(reason: str) -> None:
    tally = Tally()
    tally.feed(event(text("", reason)) + b"data: [DONE]\n\n", 1.0)
    with pytest.raises(BadStream, match=f"ended it after 0 chunks: {reason}") as raised:
        tally.close(2.0)
    assert raised.value.kind == "broken off"


def test_an_end_alone_is_no_answer() -> None:
    tally = Tally()
    tally.feed(b"data: [DONE]\n\n", 1.0)
    with pytest.raises(BadStream, match="without an end"):
        tally.close(2.0)


@pytest.mark.parametrize(
    ("usage", "counts"),
    [
        ({"prompt_tokens": 7}, (7, None)),
        ({"completion_tokens": 5}, (None, 5)),
        ({"prompt_tokens": 7, "completion_tokens": None}, (7, None)),
    ],
)
def test_servers_that_count_but_one(usage: dict[str, Any], counts: tuple[int | None, int | None]) -> None:
    tally = Tally()
    tally.feed(event({"choices": [], "usage": usage}), 1.0)
    assert (tally.prompt, tally.output) == counts


def test_tokens_without_text() -> None:
    tally = Tally()
    tally.feed(event(text("", "stop")) + event(USAGE), 1.0)
    tally.close(2.0)
    assert tally.first == 2.0


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
def test_what_is_no_answer(value: bytes, kind: str) -> None:
    with pytest.raises(BadStream) as raised:
        Tally().feed(value, 1.0)
    assert raised.value.kind == kind
    assert "\n" not in str(raised.value)
    assert kind == "broken stream" or str(raised.value) == "out of blocks"


@steady
@given(st.binary(max_size=60))
def test_nothing_else_is_raised(noise: bytes) -> None:
    with contextlib.suppress(BadStream):
        Tally().feed(b"data:" + noise + b"\n\n", 0.0)
