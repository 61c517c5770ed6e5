"""Metrics for Ray, which exports them with those of the cluster."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from shoal.lazy import load

_Key = tuple[str, tuple[tuple[str, str], ...]]


@dataclass(frozen=True, slots=True)
class MetricValue:
    """The value of a gauge or counter now, for certain labels."""

    name: str  # without the `_total` of a counter
    kind: Literal["gauge", "counter"]
    about: str
    labels: Mapping[str, str]
    value: float


class RayMetrics:
    """The metrics of this process that Ray exports. Ray puts `ray_` before their names, and `_total` after counters.

    Ray allows no colon in a name, so `vllm:num_requests_running` becomes `ray_vllm_num_requests_running`.
    """

    def __init__(self) -> None:
        self._metrics: dict[str, Any] = {}  # Ray's objects, by our names
        self._last: dict[_Key, MetricValue] = {}

    def export(self, values: Iterable[MetricValue]) -> None:
        """Give all values of this moment to Ray. Gauges that had a value before, and have none now, become 0."""
        current = {(each.name, tuple(sorted(each.labels.items()))): each for each in values}
        for key, each in current.items():
            metric = self._metric(each)
            if each.kind == "gauge":
                metric.set(each.value, tags=dict(each.labels))
                continue
            former = self._last[key].value if key in self._last else 0.0
            if each.value > former:
                metric.inc(each.value - former, tags=dict(each.labels))
        for key, gone in self._last.items():
            if key not in current and gone.kind == "gauge":
                self._metric(gone).set(0.0, tags=dict(gone.labels))
        self._last = current

    def _metric(self, of: MetricValue) -> Any:
        if of.name not in self._metrics:
            kind = load("ray.util.metrics:Gauge") if of.kind == "gauge" else load("ray.util.metrics:Counter")
            self._metrics[of.name] = kind(of.name.replace(":", "_"), of.about, tuple(of.labels))
        return self._metrics[of.name]
