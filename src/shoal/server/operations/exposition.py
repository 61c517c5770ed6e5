"""Metrics as the text that Prometheus reads: its exposition format, version 0.0.4."""

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Family:
    """Metrics of one name. A counter's name ends with `_total`; a histogram has the upper `bounds` of its buckets, to
    which one without a bound is added."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    about: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()


class Histogram:
    """`counts[i]` values were up to `bounds[i]` and above the bound before; the last count is of those above all."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float], counts: Sequence[int] = (), total: float = 0.0) -> None:
        self.bounds = bounds
        self.counts = list(counts) or [0] * (len(bounds) + 1)
        self.total = total

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def add(self, counts: Sequence[int], total: float) -> None:
        """Takes over what another one with the same bounds has."""
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, counts, strict=True)]
        self.total += total


class Page:
    """The text, a family after the other."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def put(self, family: Family, samples: Iterable[tuple[Sequence[str], float]]) -> None:
        """A counter or gauge: its labels' values, and its own."""
        self._begin(family)
        for values, value in samples:
            labels = _labels(sorted(zip(family.labels, values, strict=True)))
            self._lines.append(
                f"{family.name}{{{labels}}} {_number(value)}" if labels else f"{family.name} {_number(value)}"
            )

    def put_histograms(self, family: Family, samples: Iterable[tuple[Sequence[str], Histogram]]) -> None:
        self._begin(family)
        bounds = [_number(bound) for bound in (*family.bounds, math.inf)]
        name = family.name
        for values, histogram in samples:
            pairs = sorted(zip(family.labels, values, strict=True))
            before = "".join(f"{_labels([pair])}," for pair in pairs if pair[0] < "le")
            behind = "".join(f",{_labels([pair])}" for pair in pairs if pair[0] > "le")
            sums = list(accumulate(histogram.counts))
            self._lines += [
                f'{name}_bucket{{{before}le="{bound}"{behind}}} {count}'
                for bound, count in zip(bounds, sums, strict=True)
            ]
            labels = f"{{{_labels(pairs)}}}" if pairs else ""
            self._lines.append(f"{name}_count{labels} {sums[-1]}")
            self._lines.append(f"{name}_sum{labels} {_number(histogram.total)}")

    def _begin(self, family: Family) -> None:
        self._lines.append(f"# HELP {family.name} {family.about}")
        self._lines.append(f"# TYPE {family.name} {family.kind}")

    def text(self) -> str:
        return "\n".join(self._lines) + "\n"


def _labels(pairs: Sequence[tuple[str, str]]) -> str:
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in pairs)


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _number(value: float) -> str:
    return "+Inf" if value == math.inf else repr(value)
