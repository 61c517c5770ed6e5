"""The metrics of a fleet for Ray's exporter, if this process belongs to a Ray cluster."""

import asyncio
import json
from collections.abc import Iterator
from typing import Literal

from prometheus_client.registry import Collector

from shoal.errors import ShoalError
from shoal.launch.ray import cluster
from shoal.launch.ray.metrics import MetricValue, RayMetrics
from shoal.log import get_logger
from shoal.server.backend import Backend
from shoal.server.operations.metrics_page import CACHE_CONFIG, FleetCollector

log = get_logger("ray")

_PREFIXES = ("vllm:", "shoal:")


async def export_to_ray(llm: Backend, model_name: str, *, pause_s: float = 5.0) -> None:
    """Give the gauges and counters of a fleet to Ray every `pause_s` seconds, until this task is cancelled.

    Without a Ray cluster this returns at once. Only the process that has the fleet may call it, else all would count
    twice.
    """
    if not cluster.is_connected():
        return
    metrics = RayMetrics()
    while True:
        try:
            numbers, status = json.loads(await llm.ask("metrics")), await llm.status()
            values = values_for_ray(FleetCollector(numbers, status, model_name, llm.options))
            await asyncio.to_thread(metrics.export, list(values))
        except ShoalError as error:  # the fleet may be busy: try again
            log.debug("no metrics for Ray: %s", error)
        except Exception as error:  # noqa: BLE001 - the cluster may have ended; serving goes on without it
            log.warning("Ray takes no metrics any more: %s: %s", type(error).__name__, error)
            return
        await asyncio.sleep(pause_s)


def values_for_ray(collector: Collector) -> Iterator[MetricValue]:
    """Yield the values of our gauges and counters. Ray's histograms take single values, so ours are left out."""
    for metric in collector.collect():
        if metric.type not in ("gauge", "counter") or not metric.name.startswith(_PREFIXES):
            continue
        if metric.name == CACHE_CONFIG.name:  # its labels are its content
            continue
        kind: Literal["gauge", "counter"] = "gauge" if metric.type == "gauge" else "counter"
        for sample in metric.samples:
            yield MetricValue(metric.name, kind, metric.documentation, sample.labels, sample.value)
