"""Draw docs/trace.svg: a part of a trace, as Perfetto shows it, with a row of slices for each depth of a track.

`python tools/trace_picture.py TRACE` draws the part from --begin to --end, in milliseconds of the trace; by default it
shows the --steps consecutive steps that took the shortest time. The picture in the docs is of

    shoal bench throughput shape:qwen3-0.6b -tp 2 -pp 2 --hf-overrides '{"num_hidden_layers": 6, "vocab_size": 16384}' \
        --num-prompts 2 --input-len 64 --output-len 64 --repeat 1 --profile-comm --trace trace.json.gz
"""

import argparse
import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "trace.svg"
_WIDTH, _LEFT, _TOP = 1080, 168, 26
_ROW, _GAP = 15, 10
_CHARACTER = 5.6  # the width of a character in a label
_ROUNDING = 0.0015  # microseconds: a trace has three digits
_MARKS = 8  # on the time axis, about
_COLOURS = {
    "request": "#9bb8d9",
    "step": "#7aa6c2",
    "layer": "#a8d08d",
    "operation": "#f2b36b",
    "wait": "#e07a7a",
    "schedule": "#b39ddb",
    "launch": "#8e7cc3",
    "apply": "#6fa8a0",
    "draw": "#7aa6c2",
    "call": "#c0c0c0",
    "collect": "#c0c0c0",
}
_STYLE = "text{font:10px sans-serif;fill:#222}rect{stroke:#fff;stroke-width:.5}.track{font-size:11px}.axis{fill:#666}"


@dataclass(frozen=True, slots=True)
class Slice:
    track: tuple[int, int]  # process and thread
    kind: str
    name: str
    begin: float  # microseconds
    end: float


class Picture:
    """The slices of a trace and the names of its tracks."""

    def __init__(self, events: Sequence[dict[str, Any]]) -> None:
        self.processes = {each["pid"]: each["args"]["name"] for each in events if each["name"] == "process_name"}
        self.names = {
            (each["pid"], each["tid"]): each["args"]["name"] for each in events if each["name"] == "thread_name"
        }
        self.slices = [
            Slice((each["pid"], each["tid"]), each["cat"], each["name"], each["ts"], each["ts"] + each["dur"])
            for each in events
            if each["ph"] == "X"
        ]

    def quickest(self, steps: int) -> tuple[float, float]:
        """Return the beginning and the end, over all ranks, of the consecutive steps that took the shortest time."""
        times: dict[str, tuple[float, float]] = {}
        for each in sorted((each for each in self.slices if each.kind == "step"), key=lambda each: each.begin):
            begin, end = times.get(each.name, (each.begin, each.end))
            times[each.name] = (begin, max(end, each.end))
        found = list(times.values())
        parts = [found[i : i + steps] for i in range(max(len(found) - steps, 0) + 1)]
        return min(((part[0][0], max(end for _, end in part)) for part in parts), key=lambda part: part[1] - part[0])

    def draw(self, begin: float, end: float) -> str:
        """Return the part from `begin` to `end`, in microseconds, as SVG."""
        parts: list[str] = []
        top = _TOP
        for track in sorted({each.track for each in self.slices}):
            rows = list(_in_rows([each for each in self.slices if each.track == track]))
            inside = [(depth, each) for depth, each in rows if each.begin < end and each.end > begin]
            if not inside:
                continue
            parts.append(f'<text class="track" x="6" y="{top + 11}">{escape(self._title(track))}</text>')
            for depth, each in inside:
                parts.append(_rectangle(each, top + depth * _ROW, begin, end))
            top += (1 + max(depth for depth, _ in inside)) * _ROW + _GAP
        axis = _axis(begin, end, top)
        parts += _legend(top)
        top += _ROW + _GAP
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {top}" width="{_WIDTH}" height="{top}">'
        return (
            "\n".join(
                [
                    head,
                    f"<style>{_STYLE}</style>",
                    f'<rect width="{_WIDTH}" height="{top}" fill="#fff"/>',
                    *axis,
                    *parts,
                ]
            )
            + "\n</svg>\n"
        )

    def _title(self, track: tuple[int, int]) -> str:
        replicas = {name for name in self.processes.values() if name.startswith("replica")}
        process, name = self.processes[track[0]], self.names[track]
        return f"{process}, {name}" if process in replicas and len(replicas) > 1 else name


def _in_rows(slices: Sequence[Slice]) -> Iterator[tuple[int, Slice]]:
    """Yield the slices of a track, each with the number of slices that it lies in."""
    around: list[Slice] = []
    for each in sorted(slices, key=lambda each: (each.begin, -each.end)):
        while around and around[-1].end <= each.begin + _ROUNDING:
            around.pop()
        yield len(around), each
        around.append(each)


def _x(time: float, begin: float, end: float) -> float:
    share = (min(max(time, begin), end) - begin) / (end - begin)
    return _LEFT + share * (_WIDTH - _LEFT - 6)


def _rectangle(each: Slice, top: float, begin: float, end: float) -> str:
    left, right = _x(each.begin, begin, end), _x(each.end, begin, end)
    width = max(right - left, 0.6)
    label = each.name if len(each.name) * _CHARACTER + 4 <= width else ""
    text = f'<text x="{left + 2:.1f}" y="{top + 10.5:.1f}">{escape(label)}</text>' if label else ""
    title = f"{each.name}: {(each.end - each.begin) / 1e3:.3f} ms"
    return (
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{_ROW - 1}" fill="{_COLOURS[each.kind]}">'
        f"<title>{escape(title)}</title></rect>{text}"
    )


def _legend(top: float) -> Iterator[str]:
    """Yield a line that says what the colours are."""
    x = float(_LEFT)
    for kind in ("request", "schedule", "launch", "apply", "step", "layer", "operation", "wait"):
        yield f'<rect x="{x:.0f}" y="{top}" width="12" height="{_ROW - 4}" fill="{_COLOURS[kind]}"/>'
        yield f'<text class="axis" x="{x + 15:.0f}" y="{top + 9}">{kind}</text>'
        x += 40 + len(kind) * _CHARACTER


def _axis(begin: float, end: float, height: float) -> Iterator[str]:
    """Yield the lines and numbers of the time axis."""
    span = (end - begin) / 1e3
    unit = next(unit * 10**power for power in range(-3, 6) for unit in (1, 2, 5) if span / (unit * 10**power) <= _MARKS)
    for mark in range(int(span / unit) + 1):
        x = _x(begin + mark * unit * 1e3, begin, end)
        yield f'<path d="M{x:.1f} 18V{height:.0f}" stroke="#ddd"/>'
        yield f'<text class="axis" x="{x + 2:.1f}" y="14">{mark * unit:g} ms</text>'


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("--begin", type=float, help="milliseconds")
    parser.add_argument("--end", type=float, help="milliseconds")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--output", type=Path, default=PICTURE)
    given = parser.parse_args(arguments)
    data: bytes = given.trace.read_bytes()
    document = json.loads(gzip.decompress(data) if given.trace.suffix == ".gz" else data)
    picture = Picture(document["traceEvents"])
    begin, end = picture.quickest(given.steps)
    begin = begin if given.begin is None else given.begin * 1e3
    end = end if given.end is None else given.end * 1e3
    given.output.write_text(picture.draw(begin, end), "utf-8")
    print(f"written: {given.output}")


if __name__ == "__main__":
    main()
