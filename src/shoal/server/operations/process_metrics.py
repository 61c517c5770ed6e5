"""Metrics of one process as prometheus_client knows them: `process_*`, `python_gc_*` and `python_info`.

They are always those of the process that has the fleet. If each API server told its own, a counter would go up and
down as the requests of one scraper reach one server after another.
"""

import os
from functools import cache
from typing import Any

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

_GARBAGE = GCCollector(CollectorRegistry())
_PLATFORM = PlatformCollector(None)


def told_of_this_process() -> dict[str, Any]:
    """Return what only this process itself knows, ready for JSON."""
    garbage = [
        [each.name, each.documentation, [[sample.labels, sample.value] for sample in each.samples]]
        for each in _GARBAGE.collect()
    ]
    return {"pid": os.getpid(), "garbage": garbage}


def process_collectors(told: dict[str, Any]) -> list[Collector]:
    """Return the collectors for the process that `told` comes from, which is on this host."""
    return [_process(told["pid"]), _Garbage(told["garbage"]), _PLATFORM]


@cache
def _process(pid: int) -> ProcessCollector:
    """Return the collector that reads /proc when it is asked; there are no such metrics where /proc is missing."""
    return ProcessCollector(pid=lambda: pid, registry=None)


class _Garbage(Collector):
    """What another process's garbage collector has done."""

    def __init__(self, told: list[Any]) -> None:
        self._told = told

    def collect(self) -> list[CounterMetricFamily]:
        found = []
        for name, about, samples in self._told:
            family = CounterMetricFamily(name, about, labels=list(samples[0][0]))
            for labels, value in samples:
                family.add_metric(list(labels.values()), value)
            found.append(family)
        return found
