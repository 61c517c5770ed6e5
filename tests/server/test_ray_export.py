"""Which values of /metrics go to Ray, and what Ray is told."""

from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from shoal.launch.ray.metrics import MetricValue, RayMetrics
from shoal.server.operations.ray_export import values_for_ray


class Some(Collector):
    def collect(self) -> Iterator[Metric]:
        running = GaugeMetricFamily("vllm:num_requests_running", "Running.", labels=["engine"])
        running.add_metric(["0"], 3)
        running.add_metric(["1"], 4)
        yield running
        tokens = CounterMetricFamily("vllm:generation_tokens_total", "Tokens.", labels=["engine"])
        tokens.add_metric(["0"], 70)
        yield tokens
        yield HistogramMetricFamily("vllm:e2e", "A histogram.", buckets=[("1", 2), ("+Inf", 5)], sum_value=9)
        yield GaugeMetricFamily("vllm:cache_config_info", "Labels only.", value=1)
        yield GaugeMetricFamily("process_open_fds", "Of the process.", value=7)


def test_gauges_and_counters_go_to_ray_and_histograms_do_not() -> None:
    assert list(values_for_ray(Some())) == [
        MetricValue("vllm:num_requests_running", "gauge", "Running.", {"engine": "0"}, 3),
        MetricValue("vllm:num_requests_running", "gauge", "Running.", {"engine": "1"}, 4),
        MetricValue("vllm:generation_tokens", "counter", "Tokens.", {"engine": "0"}, 70),
    ]


class FakeMetric:
    """A metric of Ray that notes what it is told."""

    told: list[tuple[str, float, dict[str, str]]]

    def __init__(self, name: str, about: str, tag_keys: tuple[str, ...]) -> None:
        self.name = name

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.told.append((self.name, value, tags))

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0  # Ray refuses others
        self.told.append((f"{self.name} +", value, tags))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, dict[str, str]]]:
    FakeMetric.told = []
    fakes: dict[str, Any] = {"ray.util.metrics:Gauge": FakeMetric, "ray.util.metrics:Counter": FakeMetric}
    monkeypatch.setattr("shoal.launch.ray.metrics.load", fakes.__getitem__)
    return FakeMetric.told


def test_counters_are_told_by_what_was_added_and_lost_gauges_become_zero(
    told: list[tuple[str, float, dict[str, str]]],
) -> None:
    def values(tokens: float, *engines: str) -> list[MetricValue]:
        gauges = [MetricValue("vllm:running", "gauge", "", {"engine": each}, 2) for each in engines]
        return [*gauges, MetricValue("vllm:tokens", "counter", "", {"engine": "0"}, tokens)]

    metrics = RayMetrics()
    metrics.export(values(0, "0", "1"))
    metrics.export(values(70, "0", "1"))
    metrics.export(values(70, "0"))
    metrics.export(values(75, "0"))
    first, second = {"engine": "0"}, {"engine": "1"}
    assert told == [
        *(("vllm_running", 2, first), ("vllm_running", 2, second)),
        *(("vllm_running", 2, first), ("vllm_running", 2, second), ("vllm_tokens +", 70, first)),
        *(("vllm_running", 2, first), ("vllm_running", 0, second)),
        *(("vllm_running", 2, first), ("vllm_tokens +", 5, first)),
    ]
