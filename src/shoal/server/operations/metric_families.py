"""Our metrics and histograms, and their conversion to prometheus_client's, which writes the text."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily


@dataclass(frozen=True, slots=True)
class MetricFamily:
    """The definition of a metric. A counter's name ends with `_total`.

    `bounds` are the upper bounds of a histogram's buckets; one bucket without a bound is added.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    about: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()


class Histogram:
    """Counts of values by bucket: bucket i holds values up to `bounds[i]`, the last bucket those above all bounds."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float], counts: Sequence[int] = (), total: float = 0.0) -> None:
        self.bounds = bounds
        self.counts = list(counts) or [0] * (len(bounds) + 1)
        self.total = total

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def add(self, counts: Sequence[int], total: float) -> None:
        """Add the counts and the total of a histogram with the same bounds."""
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, counts, strict=True)]
        self.total += total


def as_metric(
    family: MetricFamily, samples: Iterable[tuple[Sequence[str], float]]
) -> CounterMetricFamily | GaugeMetricFamily:
    """Return a counter or gauge. A sample is the values of its labels, and its value."""
    kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    found = kind(family.name, family.about, labels=family.labels)
    for values, value in samples:
        found.add_metric(values, value)
    return found


def as_histogram(family: MetricFamily, samples: Iterable[tuple[Sequence[str], Histogram]]) -> HistogramMetricFamily:
    """Return a histogram metric. A sample is the values of its labels, and its counts."""
    found = HistogramMetricFamily(family.name, family.about, labels=family.labels)
    bounds = [*map(repr, family.bounds), "+Inf"]
    for values, histogram in samples:
        found.add_metric(values, list(zip(bounds, accumulate(histogram.counts), strict=True)), histogram.total)
    return found
