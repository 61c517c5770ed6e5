"""Tests of trace files, which are complete at any time."""

import gzip
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.trace.trace_file import TraceFile
from support.example_counts import examples

EVENTS = st.lists(st.text(max_size=40).map(lambda name: {"name": name}), max_size=5)
FACTS = st.dictionaries(st.text(max_size=3), st.text(max_size=200), max_size=3)


def read(path: Path) -> dict[str, object]:
    data = path.read_bytes()
    found: dict[str, object] = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    return found


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
@settings(max_examples=examples(50), suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(calls=st.lists(st.tuples(EVENTS, FACTS), min_size=1, max_size=6))
def test_a_reader_finds_a_whole_document_between_two_writes(
    tmp_path: Path, name: str, calls: Sequence[tuple[list[dict[str, str]], dict[str, str]]]
) -> None:
    """Also between the system calls of one `append`, of which one alone changes the file."""
    path = tmp_path / name
    seen: list[object] = []
    pwrite = os.pwrite

    def watched(fd: int, data: bytes, offset: int) -> int:
        if path.stat().st_size:
            seen.append(read(path))
        return pwrite(fd, data, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", watched)
        file = TraceFile(path)
        expected: list[dict[str, str]] = []
        size = path.stat().st_size
        for events, facts in calls:
            file.append(map(json.dumps, events), facts)
            expected += events
            found = read(path)
            assert (found["traceEvents"], found["otherData"]) == (expected, facts)
            assert path.stat().st_size >= size  # a shorter file would end in the middle for a moment
            size = path.stat().st_size
        file.close()
    assert len(seen) == len(calls)
