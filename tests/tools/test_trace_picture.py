"""docs/trace.svg is drawn from a trace."""

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import trace_picture  # noqa: E402
from shoal.wire.trace import EventKind  # noqa: E402


def of(kind: str, name: str, begin: float, duration: float, track: int = 1) -> dict[str, Any]:
    return {"ph": "X", "cat": kind, "name": name, "pid": 10, "tid": track, "ts": begin, "dur": duration, "args": {}}


def test_the_quickest_steps_are_drawn_in_rows_by_their_depth(tmp_path: Path) -> None:
    events = [
        {"ph": "M", "name": "process_name", "pid": 10, "tid": 0, "args": {"name": "replica 0"}},
        {"ph": "M", "name": "thread_name", "pid": 10, "tid": 1, "args": {"name": "rank 0 (tp 0, pp 0)"}},
        {"ph": "M", "name": "thread_name", "pid": 10, "tid": 2, "args": {"name": "rank 1 <1>"}},
        *(of("step", f"step {number}", begin, 900) for number, begin in enumerate((0, 5000, 6000, 20000))),
        of("step", "step 1", 5100, 900, 2),
        of("layer", "layer 7", 5200, 600),
        of("operation", "all_reduce", 5300, 100),
    ]
    trace = tmp_path / "trace.json"
    trace.write_text(json.dumps({"traceEvents": events}))
    picture = tmp_path / "trace.svg"
    trace_picture.main([str(trace), "--steps", "2", "--output", str(picture)])
    root = ET.parse(picture).getroot()
    drawn = {
        each[0].text: float(each.attrib["y"]) for each in root.iter("{http://www.w3.org/2000/svg}rect") if len(each)
    }
    assert list(drawn) == [
        *("step 1: 0.900 ms", "layer 7: 0.600 ms", "all_reduce: 0.100 ms", "step 2: 0.900 ms"),
    ]  # both ranks have a step 1
    assert drawn["step 2: 0.900 ms"] < drawn["layer 7: 0.600 ms"] < drawn["all_reduce: 0.100 ms"]
    texts = [each.text for each in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "rank 1 <1>" in texts


def test_each_kind_has_a_colour() -> None:
    assert trace_picture._COLOURS.keys() == {kind.name.lower() for kind in EventKind} | {"request"}
