"""/metrics: its numbers are right with any number of processes, and it has the names that dashboards read."""

import asyncio
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from shoal.cluster.fleet_server import FleetServer
from shoal.cluster.stats import add_past_counters, keep_counters
from shoal.config.engine_options import EngineOptions
from shoal.errors import ClosedError
from shoal.llm.async_llm import AsyncLLM
from shoal.params import SamplingParams
from shoal.server.http.errors import add_handlers
from shoal.server.operations.metric_families import Histogram as Ours
from shoal.server.operations.metric_families import MetricFamily, as_histogram, as_metric
from shoal.server.operations.metrics_page import add_metrics, families, page_of
from shoal.server.operations.process_metrics import facts_of_this_process, process_collectors
from shoal.server.operations.request_metrics import RequestMetrics, doubling_bounds, histogram_families
from shoal.transport.channel import Channel, wait
from shoal.wire.base import encode, replace_fields
from shoal.wire.engine import ControlCall, ControlReply, EngineRequest, Finish, RefusalKind, SeqUpdate, Updates
from shoal.wire.fleet import ContextLength, FleetStatus, to_api
from shoal.wire.ranks import Sampling
from shoal.wire.tokens import encode_tokens
from shoal.wire.traffic import Traffic
from support.asgi import get
from support.fake_backend import FakeBackend
from support.fakes import FakeClock, request, steady
from support.fleet_status import engine, fleet, ranks, replica

ROOT = Path(__file__).parent.parent.parent
SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")
LENGTH = 200  # most tokens of a sequence
WAIT_S = 120.0
TTFT, GAP, E2E = (
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:e2e_request_latency_seconds",
)

TWINS = (TTFT, GAP, E2E, "vllm:request_prompt_tokens", "vllm:request_generation_tokens")

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(text: str, *, kinds: Sequence[str] = ("counter", "gauge", "histogram")) -> Samples:
    return {
        (sample.name, tuple(sorted((name, value) for name, value in sample.labels.items() if name != "model_name"))): (
            sample.value
        )
        for family in text_string_to_metric_families(text)
        if family.type in kinds
        for sample in family.samples
    }


class Scraped:
    """The metrics of one page; a call with a name and labels returns a value."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.samples = samples(text)

    def __call__(self, name: str, **labels: object) -> float:
        return self.samples[name, tuple(sorted((key, str(value)) for key, value in labels.items()))]

    def total(self, name: str) -> float:
        """Return the sum over all labels."""
        return sum(value for (found, _), value in self.samples.items() if found == name)


def page(metrics: RequestMetrics, status: FleetStatus | None = None) -> Scraped:
    found = page_of(metrics.verbs["metrics"](b""), status or fleet(replica(0), replica(1), replica(2)), "tiny")
    return Scraped(found.decode())


def ending(seq: int, finish: Finish = Finish.LENGTH, tokens: int = 0, **more: Any) -> SeqUpdate:
    return SeqUpdate(seq, (7,) * tokens, finish=finish, **more)


# --- the recorder ------------------------------------------------------------------------------------------------


def test_the_times_of_a_request_are_measured() -> None:
    clock = FakeClock()
    metrics = RequestMetrics(LENGTH, clock=clock)
    metrics.added(replace_fields(request(0, range(12), max_tokens=40), arrival=1000.0))
    clock.now = 1001.0
    metrics.dispatched(0, 1)
    clock.now = 1002.0
    metrics.updated(1, SeqUpdate(0, (5,), cached_tokens=8, waited_us=500_000))
    clock.now = 1002.375
    metrics.updated(1, SeqUpdate(0, (5, 6, 7)))
    clock.now = 1003.0
    metrics.updated(1, ending(0, tokens=1))

    found = page(metrics)
    expected = {
        "vllm:time_to_first_token_seconds": (1, 2.0),
        "vllm:request_queue_time_seconds": (1, 1.5),
        "vllm:request_prefill_time_seconds": (1, 0.5),
        "vllm:request_decode_time_seconds": (1, 1.0),
        "vllm:request_inference_time_seconds": (1, 1.5),
        "vllm:e2e_request_latency_seconds": (1, 3.0),
        "vllm:inter_token_latency_seconds": (4, 1.0),
        "vllm:time_per_output_token_seconds": (4, 1.0),
        "vllm:request_time_per_output_token_seconds": (1, 0.25),
        "vllm:request_prompt_tokens": (1, 12),
        "vllm:request_prefill_kv_computed_tokens": (1, 4),
        "vllm:request_generation_tokens": (1, 5),
        "vllm:request_max_num_generation_tokens": (1, 5),
        "vllm:request_params_max_tokens": (1, 40),
        "vllm:request_params_n": (1, 1),
    }
    for name, (count, total) in expected.items():
        assert found(f"{name}_count", engine=1) == count, name
        assert found(f"{name}_sum", engine=1) == total, name
        assert found(f"{name}_count", engine=0) == 0, name
    assert found(f"{GAP}_bucket", engine=1, le="0.1") == 0
    assert found(f"{GAP}_bucket", engine=1, le="0.15") == 3  # 375 ms over 3 tokens
    assert found(f"{GAP}_bucket", engine=1, le="0.75") == 4
    assert found("vllm:prompt_tokens_total", engine=1) == 12
    assert found("vllm:prompt_tokens_cached_total", engine=1) == 8
    assert found("vllm:generation_tokens_total", engine=1) == 5
    assert found("vllm:request_success_total", engine=1, finished_reason="length") == 1


def test_a_request_that_moves_to_other_replicas_counts_once() -> None:
    clock = FakeClock()
    metrics = RequestMetrics(LENGTH, clock=clock)
    metrics.added(replace_fields(request(0, range(10)), arrival=1000.0))
    clock.now = 1001.0
    metrics.dispatched(0, 0)  # replica 0 ends before the first token
    clock.now = 1004.0
    metrics.dispatched(0, 1)
    clock.now = 1005.0
    metrics.updated(1, SeqUpdate(0, (1, 2)))
    clock.now = 1007.0
    metrics.dispatched(0, 2)
    clock.now = 1009.0
    metrics.updated(2, SeqUpdate(0, (3, 4), waited_us=1_000_000))
    metrics.updated(2, ending(0, Finish.STOP))

    found = page(metrics)
    assert found.total(f"{TTFT}_count") == found(f"{TTFT}_count", engine=1) == 1
    assert found(f"{TTFT}_sum", engine=1) == 5.0
    assert found("vllm:request_queue_time_seconds_sum", engine=2) == 4.0
    assert found("vllm:request_prefill_time_seconds_sum", engine=2) == 1.0
    assert found("vllm:request_decode_time_seconds_sum", engine=2) == 4.0
    assert found(f"{GAP}_count", engine=2) == 2
    assert found(f"{GAP}_sum", engine=2) == 4.0
    assert found("vllm:prompt_tokens_total", engine=1) == found.total("vllm:prompt_tokens_total") == 10
    assert found("vllm:generation_tokens_total", engine=1) == 2
    assert found("vllm:generation_tokens_total", engine=2) == 2
    assert found("vllm:request_success_total", engine=2, finished_reason="stop") == 1
    assert found.total("vllm:request_success_total") == 1


def test_all_outputs_of_a_prompt_count_as_one_prompt() -> None:
    metrics = RequestMetrics(LENGTH)
    for seq in range(3):
        metrics.added(request(seq, range(4), group=0))
        metrics.dispatched(seq, 0)
    for seq, tokens in enumerate((3, 9, 5)):
        metrics.updated(0, ending(seq, tokens=tokens))
    found = page(metrics)
    assert found("vllm:request_params_n_count", engine=0) == 1
    assert found("vllm:request_params_n_sum", engine=0) == 3
    assert found("vllm:request_max_num_generation_tokens_count", engine=0) == 1
    assert found("vllm:request_max_num_generation_tokens_sum", engine=0) == 9
    assert found("vllm:request_generation_tokens_sum", engine=0) == 17


def test_requests_are_counted_by_the_reason_of_their_end() -> None:
    metrics = RequestMetrics(LENGTH)
    refusals = [each for each in RefusalKind if each is not RefusalKind.NONE]
    for seq in range(4 + len(refusals)):
        metrics.added(request(seq, [1]))
    metrics.dispatched(1, 0)
    metrics.updated(0, SeqUpdate(1, (3, 4)))
    metrics.stopped(1)  # its client has found a stop text
    metrics.updated(0, ending(1, Finish.ABORT))
    metrics.dispatched(2, 0)
    metrics.updated(0, ending(2, Finish.ABORT, tokens=1))
    metrics.dispatched(3, 0)
    metrics.updated(0, ending(3, Finish.ABORT, error="the grammar failed"))
    metrics.ended(ending(0, Finish.ABORT))
    for seq, refusal in enumerate(refusals, 4):
        metrics.ended(ending(seq, Finish.ABORT, error="no", refusal=refusal))
    metrics.ended(ending(999))  # a request that was never added

    found = page(metrics)
    ends = {dict(labels)["finished_reason"]: 0.0 for (name, labels) in found.samples if "success" in name}
    assert set(ends) == {"stop", "length", "abort"}
    assert found("vllm:request_success_total", engine="", finished_reason="abort") == 1  # never dispatched
    assert found("vllm:request_success_total", engine=0, finished_reason="abort") == 1
    assert found("vllm:request_success_total", engine=0, finished_reason="stop") == 1
    for reason, count in {"invalid": 1, "full": 1, "late": 1, "failed": 2, "closing": 1}.items():
        assert found("shoal:requests_refused_total", reason=reason) == count
    assert found(f"{E2E}_count", engine=0) == 2


class Twin:
    """A recorder under test, beside histograms of prometheus_client that observe the same values."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.metrics = RequestMetrics(LENGTH, clock=self.clock)
        self.registry = CollectorRegistry()
        self.histograms = {
            name: Histogram(name, "x", ["model_name", "engine"], buckets=family.bounds, registry=self.registry)
            for name, family in histogram_families(LENGTH).items()
            if name in TWINS
        }
        self.counts: Counter[tuple[str, int]] = Counter()
        self.times: dict[int, float] = defaultdict(float)  # sums from arrival to the last token, of finished requests
        self.requests: list[dict[str, Any]] = []
        self.open: list[int] = []

    def see(self, name: str, engine: int, value: float, times: int = 1) -> None:
        for _ in range(times):
            self.histograms[name].labels("tiny", str(engine)).observe(value)

    def add(self, prompt: int, early: float) -> None:
        seq = len(self.requests)
        arrival = self.clock.now - early
        self.metrics.added(replace_fields(request(seq, range(prompt), max_tokens=9), arrival=arrival))
        self.requests.append({"prompt": prompt, "arrival": arrival, "tokens": 0, "replica": None})
        self.open.append(seq)

    def deal(self, which: int, to: int) -> None:
        if self.open:
            seq = self.open[which % len(self.open)]
            self.requests[seq]["replica"] = to
            self.metrics.dispatched(seq, to)

    def update(self, which: int, tokens: int, waited_us: int, finish: Finish | None) -> None:
        dispatched = [seq for seq in self.open if self.requests[seq]["replica"] is not None]
        if not dispatched or (not tokens and finish is None):
            return
        seq = dispatched[which % len(dispatched)]
        one, now = self.requests[seq], self.clock.now
        if tokens and one["tokens"]:
            self.see(GAP, one["replica"], (now - one["last"]) / tokens, tokens)
        elif tokens:
            self.see(TTFT, one["replica"], now - one["arrival"])
            self.counts["prompt", one["replica"]] += one["prompt"]
        if tokens:
            one["tokens"] += tokens
            one["last"] = now
            self.counts["generated", one["replica"]] += tokens
        self.metrics.updated(one["replica"], SeqUpdate(seq, (1,) * tokens, finish=finish, waited_us=waited_us))
        if finish is not None:
            self._finish(seq)

    def end(self, which: int, refusal: RefusalKind) -> None:
        if not self.open:
            return
        seq = self.open[which % len(self.open)]
        error = "no" if refusal is not RefusalKind.NONE else ""
        self.metrics.ended(ending(seq, Finish.ABORT, error=error, refusal=refusal))
        if not error and self.requests[seq]["replica"] is not None:
            self._finish(seq)
        else:
            self.open.remove(seq)

    def _finish(self, seq: int) -> None:
        self.open.remove(seq)
        one = self.requests[seq]
        number = one["replica"]
        self.counts["ended", number] += 1
        self.see(E2E, number, self.clock.now - one["arrival"])
        self.see("vllm:request_prompt_tokens", number, one["prompt"])
        self.see("vllm:request_generation_tokens", number, one["tokens"])
        if one["tokens"]:
            self.counts["begun and ended", number] += 1
            self.times[number] += one["last"] - one["arrival"]


STEPS = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.001, 0.01, 0.25, 1.0, 3.0]),
        st.one_of(
            st.tuples(st.just("add"), st.integers(1, 400), st.sampled_from([0.0, 0.5])),
            st.tuples(st.just("deal"), st.integers(0, 9), st.integers(0, 2)),
            st.tuples(
                st.just("update"),
                st.integers(0, 9),
                st.integers(0, 3),
                st.integers(0, 2_000_000),
                st.sampled_from([None, None, *Finish]),
            ),
            st.tuples(st.just("end"), st.integers(0, 9), st.sampled_from(RefusalKind)),
        ),
    ),
    max_size=60,
)


@settings(steady, max_examples=50)
@given(steps=STEPS)
def test_histograms_equal_those_of_prometheus_client(steps: list[tuple[float, Any]]) -> None:
    twin = Twin()
    for pause, (what, *arguments) in steps:
        twin.clock.now += pause
        getattr(twin, what)(*arguments)
    found = page(twin.metrics)

    theirs = samples(generate_latest(twin.registry).decode(), kinds=["histogram"])
    for (name, labels), value in theirs.items():
        assert found.samples[name, labels] == pytest.approx(value), (name, labels)
    for number in range(3):
        assert found("vllm:prompt_tokens_total", engine=number) == twin.counts["prompt", number]
        assert found("vllm:generation_tokens_total", engine=number) == twin.counts["generated", number]
        ends = [found("vllm:request_success_total", engine=number, finished_reason=reason) for reason in REASONS]
        assert sum(ends) == found(f"{E2E}_count", engine=number) == twin.counts["ended", number]
        parts = [f"vllm:request_{part}_time_seconds" for part in ("queue", "prefill", "decode")]
        for part in parts:
            assert found(f"{part}_count", engine=number) == twin.counts["begun and ended", number]
        assert sum(found(f"{part}_sum", engine=number) for part in parts) == pytest.approx(twin.times[number])


REASONS = ("stop", "length", "abort")


def test_ended_requests_are_not_kept_in_memory() -> None:
    metrics = RequestMetrics(LENGTH)
    for seq in range(100):
        metrics.added(request(seq, [1], group=seq - seq % 2))
        metrics.dispatched(seq, 0)
        metrics.updated(0, SeqUpdate(seq, (1,)))
    for seq in range(100):
        metrics.updated(0, ending(seq))
    assert metrics.followed == 0


# --- the text ------------------------------------------------------------------------------------------------------


def text_of(*metrics: Metric) -> str:
    class Given:
        def collect(self) -> Sequence[Metric]:
            return metrics

    return generate_latest(Given()).decode()


def test_the_page_has_the_text_format_of_prometheus() -> None:
    bounds = (0.5, 1.0, 1e6)
    histogram = Ours(bounds, (1, 0, 2, 1), 7.25)
    text = text_of(
        as_metric(MetricFamily("shoal:c_total", "counter", "Counts.", ("b", "a")), [(("1", "2"), 3)]),
        as_metric(MetricFamily("g", "gauge", "Says."), [((), 0.5)]),
        as_metric(MetricFamily("empty", "gauge", "Is there.", ("a",)), []),
        as_histogram(MetricFamily("h_total", "histogram", "Sums.", ("z",), bounds), [(("9",), histogram)]),
    )
    assert text.splitlines() == [
        "# HELP shoal:c_total Counts.",
        "# TYPE shoal:c_total counter",
        'shoal:c_total{a="2",b="1"} 3.0',
        "# HELP g Says.",
        "# TYPE g gauge",
        "g 0.5",
        "# HELP empty Is there.",
        "# TYPE empty gauge",
        "# HELP h_total Sums.",
        "# TYPE h_total histogram",
        'h_total_bucket{le="0.5",z="9"} 1.0',
        'h_total_bucket{le="1.0",z="9"} 1.0',
        'h_total_bucket{le="1000000.0",z="9"} 3.0',
        'h_total_bucket{le="+Inf",z="9"} 4.0',
        'h_total_count{z="9"} 4.0',
        'h_total_sum{z="9"} 7.25',
    ]


def test_labels_are_escaped() -> None:
    name = 'a "model"\\ of\ntwo lines'
    text = text_of(
        as_metric(MetricFamily("x", "gauge", "x", ("model_name", "y")), [((name, "1"), 2.5)]),
        as_histogram(MetricFamily("h", "histogram", "x", ("model_name",), (1.0,)), [((name,), Ours((1.0,)))]),
    )
    found = {
        sample.labels["model_name"] for family in text_string_to_metric_families(text) for sample in family.samples
    }
    assert found == {name}


def test_the_bounds_of_lengths_double_up_to_the_longest() -> None:
    assert doubling_bounds(1) == (1,)
    assert doubling_bounds(100) == (1, 2, 5, 10, 20, 50, 100)
    assert doubling_bounds(4096)[-2:] == (1000, 2000)


def test_the_names_that_vllm_dashboards_read_are_present() -> None:
    found = {family.name: family.type for family in text_string_to_metric_families(page(RequestMetrics(LENGTH)).text)}
    counters = (
        "prefix_cache_queries prefix_cache_hits prompt_tokens generation_tokens request_success num_preemptions "
        "spec_decode_num_accepted_tokens_per_pos"
    )
    histograms = (
        "time_to_first_token_seconds inter_token_latency_seconds e2e_request_latency_seconds "
        "request_queue_time_seconds request_prefill_time_seconds request_decode_time_seconds request_prompt_tokens "
        "request_generation_tokens iteration_tokens_total request_params_n request_params_max_tokens "
        "request_num_preemptions"
    )
    gauges = (
        "num_requests_running num_requests_waiting num_requests_waiting_by_reason kv_cache_usage_perc "
        "cache_config_info engine_sleep_state"
    )
    for kind, names in (("counter", counters), ("histogram", histograms), ("gauge", gauges)):
        for name in names.split():
            assert found[f"vllm:{name}"] == kind


def test_the_page_has_exactly_the_described_metrics() -> None:
    traffic = (Traffic("tp", "all_reduce", 1, 8, 20, 10, ((1, 10),)),)
    stats = replace_fields(engine(of_ranks=ranks()), accepted_by_position=(2, 1), traffic_before=traffic)
    status = fleet(replica(0, stats=stats))
    metrics = RequestMetrics(LENGTH)
    metrics.verbs["http"](json.dumps([["/x", "GET", "2xx", [1, *[0] * 21], 0.001]]).encode())
    text = page_of(metrics.verbs["metrics"](b""), status, "tiny").decode()
    assert "_created" not in text
    found = {family.name: family for family in text_string_to_metric_families(text)}
    described = {
        family.name.removesuffix("_total") if family.kind == "counter" else family.name: family for family in FAMILIES
    }
    assert set(found) == set(described) | PROCESS_METRICS
    for name, family in described.items():
        labels = {label for sample in found[name].samples for label in sample.labels}
        assert labels - {"le"} == set(family.labels), name
        assert found[name].type == family.kind
        assert found[name].documentation == family.about


FAMILIES = families(LENGTH)
PROCESS_METRICS = {
    *("process_cpu_seconds", "process_resident_memory_bytes", "process_virtual_memory_bytes"),
    *("process_start_time_seconds", "process_open_fds", "process_max_fds", "python_info"),
    *("python_gc_objects_collected", "python_gc_objects_uncollectable", "python_gc_collections"),
}


def test_the_docs_list_every_metric() -> None:
    table = re.findall(r"^\| `(\S+)` \| (\w+) \| (.*?) \| (.+) \|$", (ROOT / "docs/metrics.md").read_text(), re.M)
    assert table == [
        (each.name, each.kind, ", ".join(f"`{label}`" for label in each.labels), each.about) for each in FAMILIES
    ]


def test_the_docs_list_every_metric_of_a_process() -> None:
    listed = re.findall(r"^\| `(\S+)` \| (\w+) \| ([^|]+) \|$", (ROOT / "docs/metrics.md").read_text(), re.M)
    text = text_of(*(each for one in process_collectors(facts_of_this_process()) for each in one.collect()))
    assert {(name, kind) for name, kind, _ in listed} == set(re.findall(r"^# TYPE (\S+) (\w+)$", text, re.M))


def expressions(panel: dict[str, Any]) -> list[str]:
    return [target["expr"] for target in panel.get("targets", ())]


def test_the_grafana_dashboard_uses_metrics_that_exist() -> None:
    dashboard = json.loads((ROOT / "deploy/grafana/shoal.json").read_text())
    known = {}
    for family in FAMILIES:
        endings = ("_bucket", "_sum", "_count") if family.kind == "histogram" else ("",)
        known.update({family.name + ending: {*family.labels, "le"} for ending in endings})
    used = set()
    for panel in dashboard["panels"]:
        assert panel["type"] == "row" or expressions(panel), panel["title"]
        for expression in expressions(panel):
            assert expression.count("(") == expression.count(")")
            for name, matchers in re.findall(r"([a-zA-Z_:][\w:]*)(?:\{(.*?)\})?(?=[\[) ]|$)(?<!by)", expression):
                if ":" not in name and not name.startswith("http_"):
                    continue  # functions
                assert name in known, expression
                used.add(name)
                assert set(re.findall(r"(\w+)=~?\"", matchers)) <= known[name], expression
            for grouped in re.findall(r"by \((.*?)\)", expression):
                assert all(set(grouped.split(", ")) <= known[name] for name in re.findall(r"[\w:]+(?=\{)", expression))
    shown = {family.name for family in FAMILIES for name in used if name.startswith(family.name)}
    assert {family.name for family in FAMILIES} - shown == {"vllm:time_per_output_token_seconds"}
    variables = {each["name"]: each for each in dashboard["templating"]["list"]}
    assert set(variables) == {"datasource", "model", "engine"}
    assert variables["datasource"]["type"] == "datasource"
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in dashboard["panels"] if "targets" in panel)
    places = [tuple(panel["gridPos"][key] for key in "xywh") for panel in dashboard["panels"]]
    assert all(x + w <= 24 for x, _, w, _ in places)
    cells = [(x + i, y + j) for x, y, w, h in places for i in range(w) for j in range(h)]
    assert len(cells) == len(set(cells)), "panels overlap"
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


# --- the fleet's status --------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(steady, max_examples=40)
@given(
    replicas=st.lists(
        st.tuples(st.sampled_from(["ready", "restarting"]), st.integers(0, 9), st.integers(0, 9)),
        min_size=1,
        max_size=4,
    ),
    queued=st.integers(0, 100),
)
def test_running_and_waiting_count_each_request_once(replicas: list[tuple[str, int, int]], queued: int) -> None:
    states = [
        replace_fields(replica(number, state, stats=engine(running=9, waiting=waiting)), held=held)
        for number, (state, waiting, held) in enumerate(replicas)
    ]
    found = page(RequestMetrics(LENGTH), fleet(*states, queued=queued))
    held = sum(each.held for each in states)
    assert found.total("vllm:num_requests_running") + found.total("vllm:num_requests_waiting") == held + queued
    assert found("shoal:requests_queued") == queued
    if any(state == "ready" for state, _, _ in replicas):
        for number, (state, waiting, mine) in enumerate(replicas):
            if state != "ready":
                assert found("vllm:num_requests_waiting", engine=number) == min(waiting, mine)


@pytest.mark.parametrize(
    ("activity", "level", "state", "sleeps"),
    [
        ("awake", 0, "ready", "awake"),
        ("awake", 0, "restarting", "awake"),
        ("paused", 0, "ready", "awake"),
        ("asleep", 1, "ready", "weights_offloaded"),
        ("asleep", 2, "ready", "discard_all"),
    ],
)
def test_the_reasons_of_waiting_and_the_sleep_state_are_shown(
    activity: str, level: int, state: str, sleeps: str
) -> None:
    one = replace_fields(replica(0, state, stats=engine(waiting=2)), held=3)
    status = replace_fields(fleet(one, queued=4), activity=activity, sleep_level=level)
    found = page(RequestMetrics(LENGTH), status)
    deferred = (activity, state) != ("awake", "ready")
    name = "vllm:num_requests_waiting_by_reason"
    reasons = [found(name, engine=0, reason=reason) for reason in ("capacity", "deferred")]
    assert reasons == ([0, 6] if deferred else [6, 0])
    assert sum(reasons) == found("vllm:num_requests_waiting", engine=0)
    states = {each: found("vllm:engine_sleep_state", engine=0, sleep_state=each) for each in SLEEP_STATES}
    assert states == {each: each == sleeps for each in SLEEP_STATES}


def test_every_position_of_a_draft_has_a_counter_from_the_start() -> None:
    options = EngineOptions.from_flat(None, {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}})
    stats = replace_fields(engine(), accepted_by_position=(5, 2))
    status = fleet(replica(0, stats=stats), replica(1, stats=add_past_counters(keep_counters(stats), stats)))
    found = Scraped(page_of(RequestMetrics(LENGTH).verbs["metrics"](b""), status, "tiny", options).decode())
    name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    assert [found(name, engine=0, position=place) for place in range(3)] == [5, 2, 0]
    assert [found(name, engine=1, position=place) for place in range(3)] == [10, 4, 0]


def test_preemptions_are_counted_by_request() -> None:
    metrics = RequestMetrics(LENGTH)
    for seq, preemptions in enumerate((0, 0, 3)):
        metrics.added(request(seq, [1]))
        metrics.dispatched(seq, 0)
        metrics.updated(0, ending(seq, tokens=1, preemptions=preemptions))
    found = page(metrics)
    name = "vllm:request_num_preemptions"
    assert (found(f"{name}_count", engine=0), found(f"{name}_sum", engine=0)) == (3, 3)
    assert [found(f"{name}_bucket", engine=0, le=le) for le in ("1.0", "2.0", "3.0")] == [2, 2, 3]


def test_the_status_of_the_fleet_becomes_metrics() -> None:
    stats = replace_fields(
        engine(free=25, queries=40, hits=30, of_ranks=ranks(busy_us=1_500_000)),
        iteration_tokens=(2, 1, 0, 4, 5),
        step_tokens=100,
        preemptions=3,
        drafts=4,
        draft_tokens=8,
        accepted_tokens=6,
        busy_before=(500_000, 0),
    )
    status = fleet(replica(0, stats=stats, restarts=2), replica(3, "failed"), replays=5, accepting=False)
    found = page(RequestMetrics(LENGTH), status)
    assert found("vllm:kv_cache_usage_perc", engine=0) == 0.75
    assert found("vllm:kv_cache_usage_perc", engine=3) == 0.0
    (config,) = [dict(labels) for name, labels in found.samples if name == "vllm:cache_config_info"]
    assert (config["block_size"], config["num_gpu_blocks"], config["kv_cache_size_tokens"]) == ("16", "100", "1600")
    assert (config["enable_prefix_caching"], config["kv_cache_memory_bytes"]) == ("True", "None")
    assert config["cache_dtype"] == "auto"
    assert found("vllm:prefix_cache_queries_total", engine=0) == 40
    assert found("vllm:prefix_cache_hits_total", engine=0) == 30
    assert found("vllm:num_preemptions_total", engine=0) == 3
    assert found("vllm:spec_decode_num_drafts_total", engine=0) == 4
    assert found("vllm:spec_decode_num_draft_tokens_total", engine=0) == 8
    assert found("vllm:spec_decode_num_accepted_tokens_total", engine=0) == 6
    name = "vllm:iteration_tokens_total"
    assert [found(f"{name}_bucket", engine=0, le=le) for le in ("1.0", "8.0", "16.0", "+Inf")] == [2, 7, 12, 12]
    assert found(f"{name}_sum", engine=0) == 100
    assert found("shoal:replica_state", engine=0, state="ready") == 1
    assert found("shoal:replica_state", engine=3, state="failed") == 1
    assert found("shoal:replica_state", engine=3, state="ready") == 0
    assert found("shoal:replica_restarts_total", engine=0) == 2
    assert found("shoal:request_replays_total") == 5
    assert found("shoal:accepting_requests") == 0
    assert found("shoal:rank_memory_bytes", engine=0, rank=1, kind="anonymous") == 2 << 20
    assert found("shoal:rank_memory_bytes", engine=0, rank=0, kind="kv") == 1 << 18
    assert found("shoal:rank_memory_bytes", engine=0, rank=0, kind="weights") == 1 << 19
    assert found("shoal:rank_busy_seconds_total", engine=0, rank=0) == 2.0
    assert found("shoal:rank_busy_seconds_total", engine=0, rank=1) == 1.5


def test_communication_becomes_metrics() -> None:
    """The sums over ranks, and over processes that they had before."""
    timed = Traffic("tp", "all_reduce", 3, 4096, 2_000_000, 1_500_000, ((1, 1_500_000),))
    of_ranks = [replace_fields(rank, traffic=(timed, Traffic("pp", "send", 1, 10, 500_000))) for rank in ranks()]
    stats = replace_fields(engine(of_ranks=of_ranks), traffic_before=(replace_fields(timed, count=1),))
    untimed = engine(of_ranks=[replace_fields(ranks()[0], traffic=(Traffic("tp", "all_reduce", 5, 7),))])
    found = page(RequestMetrics(LENGTH), fleet(replica(0, stats=stats), replica(1, stats=untimed), replica(2)))
    reduce = {"axis": "tp", "operation": "all_reduce"}
    assert found("shoal:comm_operations_total", engine=0, **reduce) == 7
    assert found("shoal:comm_bytes_total", engine=0, **reduce) == 3 * 4096
    assert found("shoal:comm_seconds_total", engine=0, kind="waiting", **reduce) == 4.5
    assert found("shoal:comm_seconds_total", engine=0, kind="moving", **reduce) == 1.5
    assert found("shoal:comm_seconds_total", engine=0, kind="moving", axis="pp", operation="send") == 1.0
    assert found("shoal:comm_operations_total", engine=1, **reduce) == 5
    assert found.total("shoal:comm_operations_total") == 7 + 2 + 5
    assert found.total("shoal:comm_seconds_total") == 3 * 2.0 + 2 * 0.5


def test_counters_never_fall_when_a_replica_restarts() -> None:
    traffic = (Traffic("tp", "all_reduce", 3, 4096, 2_000_000, 1_500_000, ((1, 1_500_000),)),)
    one_life = replace_fields(
        engine(
            queries=40,
            hits=30,
            prompt=9,
            of_ranks=[replace_fields(rank, traffic=traffic) for rank in ranks(busy_us=2_000_000)],
        ),
        iteration_tokens=(1, 2),
        step_tokens=9,
        steps=3,
    )
    between = keep_counters(one_life)
    again = keep_counters(add_past_counters(between, one_life))
    at_last = add_past_counters(again, one_life)
    before: Samples = {}
    for stats in (one_life, between, add_past_counters(between, one_life), again, at_last):
        text = page(RequestMetrics(LENGTH), fleet(replica(0, stats=stats))).text
        now = samples(text, kinds=("counter", "histogram"))
        assert all(now[key] >= value for key, value in before.items())
        before = now
    found = page(RequestMetrics(LENGTH), fleet(replica(0, stats=at_last)))
    assert found("shoal:rank_busy_seconds_total", engine=0, rank=1) == 6.0
    assert found("shoal:comm_seconds_total", engine=0, axis="tp", operation="all_reduce", kind="moving") == 3.0
    assert found("vllm:prefix_cache_hits_total", engine=0) == 90
    assert found("vllm:iteration_tokens_total_sum", engine=0) == 27


# --- several API servers -------------------------------------------------------------------------------------------


class Head(FakeBackend):
    """The process with the fleet, as an API server sees it."""

    def __init__(self) -> None:
        self.metrics = RequestMetrics(LENGTH)
        super().__init__(verbs=self.metrics.verbs)
        self.gone = False
        self.handed_over = asyncio.Event()

    async def ask(self, verb: str, payload: bytes = b"", *, patient: bool = False) -> bytes:
        if self.gone:
            raise ClosedError("the engine was closed")
        answer = await super().ask(verb, payload)
        if verb == "http":
            self.handed_over.set()
        return answer


def api_server(head: Head) -> FastAPI:
    app = FastAPI()
    add_handlers(app)
    add_metrics(app, head, "tiny")

    @app.get("/things/{thing}")
    async def thing(thing: str) -> str:
        return thing

    @app.get("/health")
    async def health() -> str:
        return "ok"

    return app


def running(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(WAIT_S):
            await test()

    asyncio.run(limited())


def test_each_api_server_shows_the_counts_of_all() -> None:
    async def scenario() -> None:
        head = Head()
        first, second = api_server(head), api_server(head)
        for number in range(3):
            await get(first, f"/things/{number}")
        await get(second, "/things/9")
        await get(second, "/nothing", "BREW")
        await get(second, "/health")
        await get(second, "/metrics")
        for app in (first, second, first):
            status, text = await get(app, "/metrics")
            assert status == 200
            found = Scraped(text)
            assert found("http_requests_total", handler="/things/{thing}", method="GET", status="2xx") == 4
            assert found("http_requests_total", handler="none", method="other", status="4xx") == 1
            assert found.total("http_requests_total") == 5
            assert found("http_request_duration_highr_seconds_count") == 5
            assert found("http_request_duration_seconds_count", handler="/things/{thing}", method="GET") == 4
            assert found("http_request_duration_seconds_bucket", handler="none", method="other", le="+Inf") == 1

    running(scenario)


def test_probes_behind_a_proxys_path_are_not_counted() -> None:
    async def scenario() -> None:
        head = Head()
        app = api_server(head)
        for path in ("/llm/health", "/llm/metrics", "/llm/things/1"):
            await get(app, path, root_path="/llm")
        _, text = await get(app, "/llm/metrics", root_path="/llm")
        assert Scraped(text).total("http_requests_total") == 1

    running(scenario)


def test_an_api_server_hands_its_counts_over_by_itself() -> None:
    async def scenario() -> None:
        head = Head()
        await get(api_server(head), "/things/1")
        await head.handed_over.wait()
        assert page(head.metrics)("http_requests_total", handler="/things/{thing}", method="GET", status="2xx") == 1

    running(scenario)


def test_without_an_engine_the_cause_is_given_and_no_count_is_lost() -> None:
    async def scenario() -> None:
        head = Head()
        app = api_server(head)
        await get(app, "/things/1")
        head.gone = True
        status, text = await get(app, "/metrics")
        assert status == 503
        assert "the engine was closed" in json.loads(text)["error"]["message"]
        head.gone = False
        _, text = await get(app, "/metrics")
        assert Scraped(text).total("http_requests_total") == 1

    running(scenario)


def test_clients_that_prefer_openmetrics_get_the_usual_names() -> None:
    """OpenMetrics in prometheus_client forbids colons in names, and its choice of a format fails on some headers."""

    async def scenario() -> None:
        app = api_server(Head())
        for accepts in (b"application/openmetrics-text;version=1.0.0;q=0.5", b"text/plain;version=x", b"\xff"):
            status, text = await get(app, "/metrics", headers=[(b"accept", accepts)])
            assert status == 200
            assert re.search(r"^vllm:num_requests_running\{", text, re.MULTILINE)

    running(scenario)


@pytest.mark.slow
def test_process_metrics_describe_the_process_with_the_fleet() -> None:
    """Here it is a child process, which we recognize by its limit of open files, and this process makes the page."""
    script = (
        "import resource, sys\n"
        "from shoal.server.operations.request_metrics import RequestMetrics\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (77, 77))\n"
        "sys.stdout.buffer.write(RequestMetrics(9).verbs['metrics'](b'') + b'\\n')\n"
        "sys.stdout.flush()\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as head:
        assert head.stdout is not None
        answer = head.stdout.readline()
        found = Scraped(page_of(answer, fleet(replica(0)), "tiny").decode())
        head.communicate()
    assert found("process_max_fds") == 77
    name = "python_gc_collections_total"
    theirs = {labels["generation"]: value for labels, value in json.loads(answer)["process"]["garbage"][2][2]}
    assert {each: found(name, generation=each) for each in theirs} == theirs


# --- a real engine -------------------------------------------------------------------------------------------------


class RemoteClient:
    """The end of a line that an API server holds."""

    def __init__(self, server: FleetServer) -> None:
        theirs, sock = Channel.pair()
        self._channel = Channel(sock)
        server.connect(theirs)

    def run(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> int:
        """Run the prompts to their ends and return the number of tokens that came."""
        now = time.monotonic()
        for seq, prompt in enumerate(prompts):
            sampling = Sampling(seed=seq, temperature=1.0)
            spec = EngineRequest(seq, encode_tokens(list(prompt)), len(prompt), sampling, max_tokens, arrival=now)
            self._channel.send(encode(spec))
        count, left = 0, len(prompts)
        while left:
            for message in self._hear():
                if isinstance(message, ContextLength):
                    continue
                assert isinstance(message, Updates)
                for update in message.updates:
                    assert not update.error
                    count += len(update.tokens)
                    left -= update.finish is not None
        return count

    def ask(self, verb: str) -> bytes:
        self._channel.send(encode(ControlCall(0, verb)))
        while True:
            for message in self._hear():
                if isinstance(message, ControlReply):
                    assert not message.error
                    return message.payload

    def _hear(self) -> list[Any]:
        assert wait([self._channel], WAIT_S), f"the fleet has not answered within {WAIT_S:g} s"
        return [to_api.decode(frame) for frame in self._channel.receive()]

    def close(self) -> None:
        self._channel.close()


async def scraped(llm: AsyncLLM) -> Scraped:
    return Scraped(page_of(await llm.ask("metrics"), await llm.status(), "tiny").decode())


async def until(llm: AsyncLLM, holds: Callable[[Scraped], bool]) -> Scraped:
    """Return the first metrics for which `holds` is true. An engine sends its numbers a moment after the tokens."""
    while not holds(found := await scraped(llm)):
        await asyncio.sleep(0.05)
    return found


def counters(found: Scraped) -> Samples:
    return samples(found.text, kinds=("counter", "histogram"))


@pytest.mark.slow
def test_the_metrics_of_real_replicas_are_right_even_when_one_is_killed() -> None:
    metrics = RequestMetrics(LENGTH)

    async def scenario() -> None:
        options: dict[str, Any] = {
            "data_parallel_size": 2,
            "max_model_len": 512,
            "kv_cache_memory_bytes": 1 << 24,
            "seed": 0,
        }
        async with AsyncLLM(recorder=metrics, verbs=metrics.verbs, **options) as llm:
            assert llm.fleet_server is not None
            await llm.ready()
            remotes = [RemoteClient(llm.fleet_server) for _ in range(2)]
            counts = await asyncio.gather(*(asyncio.to_thread(remote.run, [[1, 2, 3]] * 6, 10) for remote in remotes))
            assert counts == [60, 60]
            job = llm.prepare("Once upon a time", SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True))
            await llm.stream(job).wait()
            prompt = 36 + len(job.tokens)
            found = await until(llm, lambda now: now.total("vllm:iteration_tokens_total_sum") >= prompt + 120 + 20 - 13)
            assert found.total("vllm:prompt_tokens_total") == prompt
            assert found.total("vllm:generation_tokens_total") == 140
            assert found.total("vllm:request_success_total") == 13
            assert found.total("vllm:request_generation_tokens_sum") == 140
            for name in (TTFT, E2E, "vllm:request_queue_time_seconds", "vllm:request_prompt_tokens"):
                assert found.total(f"{name}_count") == 13, name
            assert found.total(f"{GAP}_count") == 140 - 13
            assert found(f"{E2E}_count", engine=0) > 0 < found(f"{E2E}_count", engine=1)
            for remote in remotes:
                text = page_of(await asyncio.to_thread(remote.ask, "metrics"), await llm.status(), "tiny")
                assert Scraped(text.decode()).total("vllm:request_success_total") == 13
                remote.close()

            await kill_a_loaded_replica(llm, found)

    running(scenario)


async def kill_a_loaded_replica(llm: AsyncLLM, before: Scraped) -> None:
    long = llm.prepare("Once upon a time", SamplingParams(max_tokens=450, temperature=0.0, ignore_eos=True))
    victim = (await llm.status()).replicas[0].pid  # asked for beforehand: the streams end within a second
    ends = asyncio.gather(*(llm.stream(long).wait() for _ in range(6)))
    under = await until(llm, lambda now: now.total(f"{TTFT}_count") == 13 + 6)
    assert 0 < under.total("vllm:num_requests_running") + under.total("vllm:num_requests_waiting") <= 6
    os.kill(victim, signal.SIGKILL)
    readings = [counters(before), counters(under)]
    while not ends.done() or (await llm.status()).replicas[0].state != "ready":
        readings.append(counters(await scraped(llm)))
        await asyncio.sleep(0.02)
    for output in await ends:
        assert len(output.outputs[0].token_ids) == 450
    stopping = llm.prepare("Once upon a time", SamplingParams(max_tokens=300, temperature=0.0, stop=["e"]))
    await llm.stream(stopping).wait()
    after = await until(llm, lambda now: now.total("vllm:request_success_total") == 20)
    readings.append(counters(after))
    for one, following in itertools.pairwise(readings):
        fallen = {key: (value, following.get(key)) for key, value in one.items() if following.get(key, -1.0) < value}
        assert not fallen
    assert after("shoal:replica_restarts_total", engine=0) == 1
    assert after("shoal:request_replays_total") > 0
    assert after.total(f"{TTFT}_count") == 20
    assert after.total("vllm:request_generation_tokens_sum") >= 140 + 6 * 450
    reasons: Counter[str] = Counter()
    for (name, labels), value in after.samples.items():
        if name == "vllm:request_success_total":
            reasons[dict(labels)["finished_reason"]] += int(value)
    assert reasons == {"stop": 1, "length": 19, "abort": 0}
