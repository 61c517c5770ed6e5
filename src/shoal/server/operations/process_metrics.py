"""prometheus_client's metrics of a process: `process_*`, `python_gc_*` and `python_info`.

They always describe the process that has the fleet. If each API server gave its own, counters would jump up and down,
since one scraper reaches different servers in turn.
"""

import os
from functools import cache
from typing import Any

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

_GARBAGE = GCCollector(CollectorRegistry())
_PLATFORM = PlatformCollector(None)


def facts_of_this_process() -> dict[str, Any]:
    """Return the facts for metrics that only the process itself knows, ready for JSON."""
    garbage = [
        [each.name, each.documentation, [[sample.labels, sample.value] for sample in each.samples]]
        for each in _GARBAGE.collect()
    ]
    return {"pid": os.getpid(), "garbage": garbage}


def process_collectors(facts: dict[str, Any]) -> list[Collector]:
    """Return collectors for the process on this host that has these facts."""
    return [_process(facts["pid"]), _Garbage(facts["garbage"]), _PLATFORM]


@cache
def _process(pid: int) -> ProcessCollector:
    """Return the collector that reads /proc when it is asked; there are no such metrics where /proc is missing."""
    return ProcessCollector(pid=lambda: pid, registry=None)


class _Garbage(Collector):
    """Collector for the garbage collector of another process."""

    def __init__(self, counts: list[Any]) -> None:
        self._counts = counts

    def collect(self) -> list[CounterMetricFamily]:
        found = []
        for name, description, samples in self._counts:
            family = CounterMetricFamily(name, description, labels=list(samples[0][0]))
            for labels, value in samples:
                family.add_metric(list(labels.values()), value)
            found.append(family)
        return found
