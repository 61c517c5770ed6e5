"""GET /metrics: the counts of RequestMetrics and the status of the fleet, as text for Prometheus.

Any API server answers for all of them. The process that has the fleet gives the numbers; prometheus_client writes the
text here. It is always Prometheus' own format: OpenMetrics would turn the colon in names like `vllm:` into `vllm_`.
"""

import asyncio
import json
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fastapi import APIRouter, FastAPI, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, Metric, generate_latest
from prometheus_client.registry import Collector

from shoal.activity import ActivityState
from shoal.cluster.stats import total_traffic
from shoal.config.engine_options import EngineOptions
from shoal.errors import ShoalError
from shoal.server.backend import Backend
from shoal.server.http.errors import HttpError, error_responses
from shoal.server.operations import cache_config_labels
from shoal.server.operations.http_counts import DURATION, FINE_DURATION, REQUESTS, CountRequests, HandOver, HttpCounts
from shoal.server.operations.metric_families import Histogram, MetricFamily, as_histogram, as_metric
from shoal.server.operations.process_metrics import process_collectors
from shoal.server.operations.request_metrics import (
    COUNTERS,
    GAP,
    LABELS,
    REASONS,
    REFUSALS,
    REFUSED,
    SUCCESS,
    histogram_families,
)
from shoal.wire.engine import EngineStats
from shoal.wire.fleet import FleetStatus, ReplicaStatus

_ANSWER_S = 10.0
STATES = ("starting", "ready", "restarting", "awaited", "leaving", "failed")


# --- metrics from the status of the fleet ----------------------------------------------------------------------------

RUNNING = MetricFamily("vllm:num_requests_running", "gauge", "Requests that a replica is computing.", LABELS)
WAITING = MetricFamily(
    "vllm:num_requests_waiting",
    "gauge",
    "Requests that wait in a replica, and its share of those that wait at the router.",
    LABELS,
)
KV_USAGE = MetricFamily(
    "vllm:kv_cache_usage_perc", "gauge", "Share of the KV blocks that requests hold, from 0 to 1.", LABELS
)
CACHE_CONFIG = MetricFamily(
    "vllm:cache_config_info",
    "gauge",
    "Number and size of the KV blocks, and options of the cache, as labels.",
    (*LABELS, *cache_config_labels.NAMES),
)
WAITING_BY_REASON = MetricFamily(
    "vllm:num_requests_waiting_by_reason",
    "gauge",
    "Waiting requests by reason: for room (capacity), or until a replica is ready and not paused (deferred).",
    (*LABELS, "reason"),
)
SLEEP_STATE = MetricFamily(
    "vllm:engine_sleep_state",
    "gauge",
    "1 for the current state: awake, or asleep at level 1 (weights_offloaded) or 2 (discard_all).",
    (*LABELS, "sleep_state"),
)
_SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")  # by level
ACCEPTED_BY_POSITION = MetricFamily(
    "vllm:spec_decode_num_accepted_tokens_per_pos_total",
    "counter",
    "Accepted drafts by their position in a round, from 0 on.",
    (*LABELS, "position"),
)
ITERATION_TOKENS = MetricFamily(
    "vllm:iteration_tokens_total",
    "histogram",
    "Tokens computed in a step.",
    LABELS,
    (1.0, *(2.0**i for i in range(3, 15))),
)
_ENGINE_COUNTERS: list[tuple[MetricFamily, Callable[[EngineStats], int]]] = [
    (MetricFamily(name, "counter", about, LABELS), value)
    for name, about, value in (
        ("vllm:prefix_cache_queries_total", "Tokens looked up in the prefix cache.", lambda s: s.prefix_queries),
        ("vllm:prefix_cache_hits_total", "Tokens found in the prefix cache.", lambda s: s.prefix_hits),
        (
            "vllm:num_preemptions_total",
            "Preemptions: requests that gave their blocks back to make room for others.",
            lambda s: s.preemptions,
        ),
        (
            "vllm:spec_decode_num_drafts_total",
            "Rounds of speculative decoding, counted for each sequence.",
            lambda s: s.drafts,
        ),
        ("vllm:spec_decode_num_draft_tokens_total", "Draft tokens of speculative decoding.", lambda s: s.draft_tokens),
        (
            "vllm:spec_decode_num_accepted_tokens_total",
            "Draft tokens that the model accepted.",
            lambda s: s.accepted_tokens,
        ),
        ("shoal:steps_total", "Steps of the engine.", lambda s: s.steps),
        (
            "shoal:rank_replacements_total",
            "Ranks that died and were replaced alone, while all other ranks kept their weights.",
            lambda s: s.rank_replacements,
        ),
    )
]

STATE = MetricFamily(
    "shoal:replica_state", "gauge", "1 for the current state of a replica, 0 for all other states.", (*LABELS, "state")
)
RESTARTS = MetricFamily("shoal:replica_restarts_total", "counter", "Restarts of a replica.", LABELS)
MEMORY = MetricFamily(
    "shoal:rank_memory_bytes",
    "gauge",
    "Memory of a rank: weights, KV cache in use, and all that is not mapped from files (anonymous).",
    (*LABELS, "rank", "kind"),
)
BUSY = MetricFamily("shoal:rank_busy_seconds_total", "counter", "Seconds that a rank has computed.", (*LABELS, "rank"))
COMM_OPERATIONS = MetricFamily(
    "shoal:comm_operations_total",
    "counter",
    "Operations that exchange tensors between ranks, added up over ranks.",
    (*LABELS, "axis", "operation"),
)
COMM_BYTES = MetricFamily(
    "shoal:comm_bytes_total",
    "counter",
    "Bytes that ranks sent to each other in these operations.",
    (*LABELS, "axis", "operation"),
)
COMM_SECONDS = MetricFamily(
    "shoal:comm_seconds_total",
    "counter",
    "Seconds of ranks in these operations: moving tensors, or waiting for other ranks; gloo's are all moving.",
    (*LABELS, "axis", "operation", "kind"),
)
QUEUED = MetricFamily(
    "shoal:requests_queued", "gauge", "Requests that wait at the router, given to no replica yet.", ("model_name",)
)
REPLAYS = MetricFamily(
    "shoal:request_replays_total",
    "counter",
    "Requests that were continued on another replica after theirs had ended.",
    ("model_name",),
)
API_RESTARTS = MetricFamily("shoal:api_server_restarts_total", "counter", "Restarts of API servers.", ("model_name",))
ACCEPTING = MetricFamily(
    "shoal:accepting_requests",
    "gauge",
    "1 while new requests are accepted, 0 while draining or after a failure.",
    ("model_name",),
)

# For older dashboards; the values are those of GAP.
OLD_GAP = MetricFamily(
    "vllm:time_per_output_token_seconds", "histogram", f"The same as {GAP}.", LABELS, histogram_families(1)[GAP].bounds
)


def families(max_model_len: int) -> list[MetricFamily]:
    """Return the definitions of all our metrics at /metrics; those of the process are in `process_metrics`."""
    return [
        *(RUNNING, WAITING, WAITING_BY_REASON, KV_USAGE, CACHE_CONFIG, SLEEP_STATE),
        *(family for family, _ in _ENGINE_COUNTERS),
        ACCEPTED_BY_POSITION,
        ITERATION_TOKENS,
        *(
            STATE,
            RESTARTS,
            MEMORY,
            BUSY,
            COMM_OPERATIONS,
            COMM_BYTES,
            COMM_SECONDS,
            QUEUED,
            REPLAYS,
            API_RESTARTS,
            ACCEPTING,
        ),
        *COUNTERS.values(),
        *(SUCCESS, REFUSED),
        *histogram_families(max_model_len).values(),
        *(OLD_GAP, REQUESTS, DURATION, FINE_DURATION),
    ]


def page_of(answer: bytes, status: FleetStatus, model_name: str, options: EngineOptions | None = None) -> bytes:
    """Return the text for Prometheus.

    Args:
        answer: the answer of `RequestMetrics` to "metrics".
        options: the options of the replicas.
    """
    found = json.loads(answer)
    registry = CollectorRegistry()
    registry.register(FleetCollector(found, status, model_name, EngineOptions(None) if options is None else options))
    for collector in process_collectors(found["process"]):
        registry.register(collector)
    return generate_latest(registry)


class FleetCollector(Collector):
    """The metrics of a fleet at one moment, from the counts of its requests and its status."""

    def __init__(self, numbers: dict[str, Any], status: FleetStatus, model_name: str, options: EngineOptions) -> None:
        self._numbers = numbers
        self._status = status
        self._model_name = model_name
        self._options = options

    def collect(self) -> Iterator[Metric]:
        yield from _status_metrics(self._status, self._model_name)
        yield from _settings_metrics(self._status, self._model_name, self._options)
        yield from _rank_metrics(self._status, self._model_name)
        yield from _comm_metrics(self._status, self._model_name)
        yield from _request_metrics(self._numbers, self._status, self._model_name)
        yield from _http_metrics(self._numbers["http"])


def _status_metrics(status: FleetStatus, model_name: str) -> Iterator[Metric]:
    replicas = [(replica, (model_name, str(replica.number))) for replica in status.replicas]
    known = [(stats, labels) for replica, labels in replicas if (stats := replica.stats) is not None]
    waiting = [_waiting(replica) for replica in status.replicas]
    yield as_metric(
        RUNNING,
        ((labels, replica.held - waits) for (replica, labels), waits in zip(replicas, waiting, strict=True)),
    )
    waiting = [waits + share for waits, share in zip(waiting, _shares(status), strict=True)]
    yield as_metric(WAITING, ((labels, waits) for (_, labels), waits in zip(replicas, waiting, strict=True)))
    deferred = _defers(status)
    yield as_metric(
        WAITING_BY_REASON,
        (
            ((*labels, reason), waits if is_it else 0)
            for (_, labels), waits in zip(replicas, waiting, strict=True)
            for reason, is_it in (("capacity", not deferred), ("deferred", deferred))
        ),
    )
    yield as_metric(KV_USAGE, ((labels, _used(replica.stats)) for replica, labels in replicas))
    yield as_metric(
        SLEEP_STATE,
        (
            ((*labels, name), int(level == status.sleep_level))
            for _, labels in replicas
            for level, name in enumerate(_SLEEP_STATES)
        ),
    )
    for family, value in _ENGINE_COUNTERS:
        yield as_metric(family, ((labels, value(stats)) for stats, labels in known))
    yield as_histogram(ITERATION_TOKENS, ((labels, _iterations(stats)) for stats, labels in known))
    yield as_metric(
        STATE,
        (((*labels, state), int(replica.state == state)) for replica, labels in replicas for state in STATES),
    )
    yield as_metric(RESTARTS, ((labels, replica.restarts) for replica, labels in replicas))
    yield as_metric(QUEUED, [((model_name,), status.queued)])
    yield as_metric(REPLAYS, [((model_name,), status.replays)])
    yield as_metric(ACCEPTING, [((model_name,), int(status.accepting))])


def _settings_metrics(status: FleetStatus, model_name: str, options: EngineOptions) -> Iterator[Metric]:
    """Yield the metrics that also depend on the options of the replicas."""
    known = [
        (replica.stats, (model_name, str(replica.number))) for replica in status.replicas if replica.stats is not None
    ]
    yield as_metric(
        CACHE_CONFIG,
        (((*labels, *cache_config_labels.values(options, stats)), 1) for stats, labels in known if stats.num_blocks),
    )
    speculative = options.model_options.speculative_config
    most = speculative.num_speculative_tokens if speculative is not None else 0
    yield as_metric(
        ACCEPTED_BY_POSITION,
        (
            ((*labels, str(position)), count)
            for stats, labels in known
            for position, count in enumerate(_filled(stats.accepted_by_position, most))
        ),
    )


def _filled(counts: Sequence[int], most: int) -> list[int]:
    """Return the counts by position, with 0 for positions at which no draft was accepted yet."""
    return [*counts, *[0] * (most - len(counts))]


def _defers(status: FleetStatus) -> bool:
    """Return True if requests wait for a replica to be ready and not paused, rather than for a replica with room."""
    return status.activity != ActivityState.AWAKE or not any(replica.state == "ready" for replica in status.replicas)


def _waiting(replica: ReplicaStatus) -> int:
    """Return how many requests of a replica wait. `stats` may be older than `held`, which is always current."""
    return 0 if replica.stats is None else min(replica.stats.waiting, replica.held)


def _shares(status: FleetStatus) -> list[int]:
    """Return each replica's share of the router's queue, so that an autoscaler that reads one replica sees the queue.

    Ready replicas share it, or all replicas if none is ready.
    """
    takers = [replica.state == "ready" for replica in status.replicas]
    if not any(takers):
        takers = [True] * len(takers)
    shares, left, takers_left = [], status.queued, sum(takers)
    for takes in takers:
        share = -(-left // takers_left) if takes else 0
        shares.append(share)
        left -= share
        takers_left -= takes
    return shares


def _used(stats: EngineStats | None) -> float:
    if stats is None or not stats.num_blocks:
        return 0.0
    return 1.0 - stats.free_blocks / stats.num_blocks


def _iterations(stats: EngineStats) -> Histogram:
    found = Histogram(ITERATION_TOKENS.bounds)
    for doublings, count in enumerate(stats.iteration_tokens):
        found.counts[bisect_left(found.bounds, 2.0**doublings)] += count
    found.total = stats.step_tokens
    return found


def _rank_metrics(status: FleetStatus, model_name: str) -> Iterator[Metric]:
    memory: list[tuple[Sequence[str], float]] = []
    busy: list[tuple[Sequence[str], float]] = []
    for replica in status.replicas:
        if replica.stats is None:
            continue
        engine = (model_name, str(replica.number))
        for rank in replica.stats.ranks:
            kinds = {"anonymous": rank.anonymous, "kv": rank.kv_bytes, "weights": rank.weight_bytes}
            memory += [((*engine, str(rank.rank), kind), held) for kind, held in kinds.items()]
        busy += [((*engine, str(rank)), us / 1e6) for rank, us in _busy(replica.stats)]
    yield as_metric(MEMORY, memory)
    yield as_metric(BUSY, busy)


def _busy(stats: EngineStats) -> Iterator[tuple[int, int]]:
    """Yield the microseconds that each rank has computed, over all restarts."""
    found = dict(enumerate(stats.busy_before))
    for rank in stats.ranks:
        found[rank.rank] = found.get(rank.rank, 0) + rank.busy_us
    yield from sorted(found.items())


def _comm_metrics(status: FleetStatus, model_name: str) -> Iterator[Metric]:
    found = [
        ((model_name, str(replica.number), part.axis, part.operation), part)
        for replica in status.replicas
        if replica.stats is not None
        for part in total_traffic(replica.stats)
    ]
    yield as_metric(COMM_OPERATIONS, ((labels, part.count) for labels, part in found))
    yield as_metric(COMM_BYTES, ((labels, part.sent_bytes) for labels, part in found))
    yield as_metric(
        COMM_SECONDS,
        (
            ((*labels, kind), us / 1e6)
            for labels, part in found
            if part.us is not None
            for kind, us in (("moving", part.us - (part.waited_us or 0)), ("waiting", part.waited_us or 0))
        ),
    )


# --- metrics from the counts of requests -----------------------------------------------------------------------------


def _request_metrics(numbers: dict[str, Any], status: FleetStatus, model_name: str) -> Iterator[Metric]:
    """Yield the counts of requests. Engines that have done nothing yet have zeros, so that a rate has a beginning."""
    engines: dict[str, Any] = {str(replica.number): None for replica in status.replicas} | numbers["engines"]
    for name, family in COUNTERS.items():
        yield as_metric(
            family,
            (((model_name, number), engine["counters"][name] if engine else 0) for number, engine in engines.items()),
        )
    ends: dict[tuple[str, str], int] = {(number, reason): 0 for number in engines for reason in REASONS.values()}
    ends |= {("" if number < 0 else str(number), reason): count for number, reason, count in numbers["ends"]}
    yield as_metric(SUCCESS, (((model_name, *key), count) for key, count in ends.items()))
    refused = dict.fromkeys(REFUSALS.values(), 0) | numbers["refused"]
    yield as_metric(REFUSED, (((model_name, reason), count) for reason, count in refused.items()))
    yield as_metric(API_RESTARTS, [((model_name,), numbers["api_server_restarts"])])
    for name, family in histogram_families(numbers["max_model_len"]).items():
        found = [
            ((model_name, number), Histogram(family.bounds, *(engine["histograms"][name] if engine else ())))
            for number, engine in engines.items()
        ]
        yield as_histogram(family, found)
        if name == GAP:
            yield as_histogram(OLD_GAP, found)


def _http_metrics(numbers: list[Any]) -> Iterator[Metric]:
    http = HttpCounts()
    http.take(numbers)
    yield as_metric(REQUESTS, http.requests())
    yield as_histogram(DURATION, http.durations())
    yield as_histogram(FINE_DURATION, [((), http.all_durations())])


# --- the route -------------------------------------------------------------------------------------------------------


def add_metrics(app: FastAPI, llm: Backend, model_name: str) -> None:
    """Add GET /metrics, and count all HTTP requests to `app`. `model_name` is the value of that label."""
    counts = HandOver(lambda payload: llm.ask("http", payload))
    app.add_middleware(CountRequests, counts=counts)
    app.include_router(_routes(llm, model_name, counts))


def _routes(llm: Backend, model_name: str, counts: HandOver) -> APIRouter:
    router = APIRouter(tags=["admin"])

    @router.get(
        "/metrics",
        summary="Counts and durations, for Prometheus",
        response_class=PlainTextResponse,
        responses=error_responses(503),
    )
    async def metrics() -> Response:
        try:
            async with asyncio.timeout(_ANSWER_S):
                numbers = await _numbers(llm, counts)
                status = await llm.status()
        except (ShoalError, TimeoutError) as error:
            raise HttpError(503, f"no metrics from the fleet: {error or f'no answer within {_ANSWER_S:g} s'}") from None
        text = await asyncio.to_thread(page_of, numbers, status, model_name, llm.options)
        return Response(text, media_type=CONTENT_TYPE_PLAIN_0_0_4)

    return router


async def _numbers(llm: Backend, counts: HandOver) -> bytes:
    payload = counts.give()
    try:
        return await llm.ask("metrics", payload)
    except ShoalError:
        counts.take_back(payload)
        raise
