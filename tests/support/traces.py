"""Reading trace files, and checks that hold for each of them."""

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

_ROUNDING_US = 0.0011  # times are written with three digits, so that two of them may differ by a nanosecond


@dataclass(frozen=True)
class Slice:
    """A slice of a track. Times are microseconds."""

    process: str
    track: str
    kind: str
    name: str
    begin: float
    duration: float
    args: dict[str, Any]

    @property
    def end(self) -> float:
        return self.begin + self.duration


class Trace:
    """A trace file, whose slices have been checked: none has a negative time, and those of a track nest."""

    def __init__(self, path: Path) -> None:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        document = json.loads(data)
        assert set(document) == {"displayTimeUnit", "traceEvents", "otherData"}
        self.events: list[dict[str, Any]] = document["traceEvents"]
        self.facts: dict[str, Any] = document["otherData"]
        for track in {slice_.track for slice_ in self.slices}:
            check_nesting([slice_ for slice_ in self.slices if slice_.track == track])

    @cached_property
    def slices(self) -> list[Slice]:
        processes = {each["pid"]: each["args"]["name"] for each in self.events if each["name"] == "process_name"}
        names = {
            (each["pid"], each["tid"]): each["args"]["name"] for each in self.events if each["name"] == "thread_name"
        }
        return [
            Slice(
                processes[each["pid"]],
                f"{processes[each['pid']]}, {names[each['pid'], each['tid']]}",
                each["cat"],
                each["name"],
                each["ts"],
                each["dur"],
                each["args"],
            )
            for each in self.events
            if each["ph"] == "X"
        ]

    @property
    def tracks(self) -> set[str]:
        return {slice_.track for slice_ in self.slices}

    def of(self, kind: str, track: str = "") -> list[Slice]:
        """Return the slices of a kind, of all tracks or of one."""
        return [each for each in self.slices if each.kind == kind and track in ("", each.track)]


def check_nesting(slices: Sequence[Slice]) -> None:
    """Check that slices of one track begin after the trace, end after their beginnings, and nest."""
    open_: list[Slice] = []
    for each in sorted(slices, key=lambda each: (each.begin, -each.duration)):
        assert each.begin >= 0, each
        assert each.duration >= 0, each
        while open_ and open_[-1].end <= each.begin + _ROUNDING_US:
            open_.pop()
        assert not open_ or each.end <= open_[-1].end + _ROUNDING_US, (open_[-1], each)
        open_.append(each)
