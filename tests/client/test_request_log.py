"""Logs of requests, which can be replayed."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.client.load.outcome import Failure, LoadOutcome
from shoal.client.load.request_log import log_line, read_log
from shoal.client.load.workload import PlannedRequest
from shoal.errors import UserError
from support.fakes import steady

seconds = st.floats(0, 1e4)
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
planned = st.builds(
    PlannedRequest,
    index=st.integers(0, 99),
    arrival=st.none(),
    prompt=texts | st.lists(st.integers(0, 999), min_size=1, max_size=9),
    prompt_tokens=st.integers(1, 99),
    max_tokens=st.integers(1, 99),
)
outcomes = st.builds(
    LoadOutcome,
    request=planned,
    arrival=seconds,
    sent=seconds,
    ended=seconds,
    first=st.none() | seconds,
    last=st.none() | seconds,
    output_tokens=st.integers(0, 99),
    failure=st.none() | st.builds(Failure, texts, texts),
)


@pytest.mark.slow
@steady
@given(st.lists(outcomes, min_size=1, max_size=6))
def test_a_written_log_can_be_read(logged: list[LoadOutcome]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "log.jsonl"
        path.write_text("".join(map(log_line, logged)), "utf-8")
        entries = read_log(path)
    start = min(each.arrival for each in logged)
    ordered = sorted(logged, key=lambda each: (each.arrival - start, each.request.index))
    wanted = [(each.arrival - start, each.request.max_tokens, each.request.prompt) for each in ordered]
    assert [(entry.arrival, entry.max_tokens, entry.prompt) for entry in entries] == wanted


def test_a_burst_is_read_in_its_order(tmp_path: Path) -> None:
    """The lines of the log are in the order in which requests ended."""
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({**GOOD, "index": i, "max_tokens": i + 1}) + "\n" for i in (2, 0, 1)))
    assert [entry.max_tokens for entry in read_log(path)] == [1, 2, 3]


def test_lengths_are_enough(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(
        '{"arrival_s": 9, "prompt_tokens": 5, "output_tokens": 3}\n\n{"arrival_s": 8, "prompt": [1], "max_tokens": 2}\n'
    )
    first, second = read_log(path)
    assert (first.arrival, first.prompt, first.prompt_tokens, first.max_tokens) == (0.0, [1], 1, 2)
    assert (second.arrival, second.prompt, second.prompt_tokens, second.max_tokens) == (1.0, None, 5, 3)


GOOD: dict[str, Any] = {"arrival_s": 0, "prompt": "a", "max_tokens": 1}


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ("{", "line 2"),
        ("5", "line 2"),
        ({**GOOD, "prompt": {}}, "line 2: prompt is neither text nor token ids"),
        ({**GOOD, "prompt": [-1]}, "line 2: prompt is neither text nor token ids"),
        ({**GOOD, "prompt": None}, "line 2: 'prompt_tokens' is missing"),
        ({**GOOD, "max_tokens": 0}, "line 2: max_tokens is 0"),
        ({**GOOD, "max_tokens": None}, "line 2: 'output_tokens' is missing"),
        ({**GOOD, "arrival_s": "soon"}, "line 2"),
        ({**GOOD, "arrival_s": float("nan")}, "line 2: arrival_s is nan"),
    ],
)
def test_a_wrong_line_is_refused(tmp_path: Path, record: Any, said: str) -> None:
    path = tmp_path / "log.jsonl"
    line = record if isinstance(record, str) else json.dumps(record)
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(UserError) as raised:
        read_log(path)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_unusable_file_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_text("\n")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff")
    for path, said in [
        (tmp_path / "none", "No such file"),
        (tmp_path, "directory"),
        (empty, "no requests"),
        (binary, "UTF-8"),
    ]:
        with pytest.raises(UserError, match=said):
            read_log(path)
