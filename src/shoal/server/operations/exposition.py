"""Metrics of ours as prometheus_client's, which makes the text that Prometheus reads."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily


@dataclass(frozen=True, slots=True)
class MetricFamily:
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
        """Add what another one with the same bounds has."""
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, counts, strict=True)]
        self.total += total


def as_metric(
    family: MetricFamily, samples: Iterable[tuple[Sequence[str], float]]
) -> CounterMetricFamily | GaugeMetricFamily:
    """Return a counter or gauge with its samples, each the values of its labels and its own."""
    kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    found = kind(family.name, family.about, labels=family.labels)
    for values, value in samples:
        found.add_metric(values, value)
    return found


def as_histogram(family: MetricFamily, samples: Iterable[tuple[Sequence[str], Histogram]]) -> HistogramMetricFamily:
    """Return a histogram with its samples, each the values of its labels and its counts."""
    found = HistogramMetricFamily(family.name, family.about, labels=family.labels)
    bounds = [*map(repr, family.bounds), "+Inf"]
    for values, histogram in samples:
        found.add_metric(values, list(zip(bounds, accumulate(histogram.counts), strict=True)), histogram.total)
    return found
