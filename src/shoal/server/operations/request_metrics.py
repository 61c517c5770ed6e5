"""Counts and durations of requests, kept in the process that has the fleet, however many processes serve HTTP.

Names, labels and buckets are those that dashboards and autoscalers for vLLM read; docs/metrics.md lists them.
"""

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shoal.server.operations.http_counts import HttpCounts
from shoal.server.operations.metric_families import Histogram, MetricFamily
from shoal.server.operations.process_metrics import facts_of_this_process
from shoal.wire.engine import EngineRequest, Finish, RefusalKind, SeqUpdate

LABELS = ("model_name", "engine")
REASONS: dict[Finish, str] = {Finish.STOP: "stop", Finish.LENGTH: "length", Finish.ABORT: "abort"}
REFUSALS: dict[RefusalKind, str] = {
    refusal: refusal.name.lower() for refusal in RefusalKind if refusal is not RefusalKind.NONE
}

_FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
    *(160.0, 640.0, 2560.0),
)
_TOKEN_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0),
    *(1920.0, 7680.0),
)
_OUTPUTS = (1.0, 2.0, 5.0, 10.0, 20.0)
_FEW = (1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0)

FIRST_TOKEN = "vllm:time_to_first_token_seconds"
GAP = "vllm:inter_token_latency_seconds"
_MEAN_GAP = "vllm:request_time_per_output_token_seconds"
_E2E = "vllm:e2e_request_latency_seconds"
_QUEUE = "vllm:request_queue_time_seconds"
_INFERENCE = "vllm:request_inference_time_seconds"
_PREFILL = "vllm:request_prefill_time_seconds"
_DECODE = "vllm:request_decode_time_seconds"
_PROMPT = "vllm:request_prompt_tokens"
_COMPUTED = "vllm:request_prefill_kv_computed_tokens"
_GENERATED = "vllm:request_generation_tokens"
_LONGEST = "vllm:request_max_num_generation_tokens"
_MAX_TOKENS = "vllm:request_params_max_tokens"
_N = "vllm:request_params_n"
_PREEMPTIONS = "vllm:request_num_preemptions"

PROMPT_TOKENS = "vllm:prompt_tokens_total"
CACHED_TOKENS = "vllm:prompt_tokens_cached_total"
GENERATED_TOKENS = "vllm:generation_tokens_total"

SUCCESS = MetricFamily(
    "vllm:request_success_total",
    "counter",
    "Requests that ended without an error, by reason; the label engine is empty if no replica had them.",
    (*LABELS, "finished_reason"),
)
REFUSED = MetricFamily(
    "shoal:requests_refused_total",
    "counter",
    "Requests that ended with an error, by kind of error.",
    ("model_name", "reason"),
)


def doubling_bounds(most: int) -> tuple[float, ...]:
    """Return 1, 2, 5, 10, 20, 50, ... up to `most`."""
    found: list[float] = []
    scale = 1
    while scale <= most:
        found += [float(step * scale) for step in (1, 2, 5) if step * scale <= most]
        scale *= 10
    return tuple(found)


def histogram_families(max_model_len: int) -> dict[str, MetricFamily]:
    lengths = doubling_bounds(max_model_len)
    table: list[tuple[str, tuple[float, ...], str]] = [
        (FIRST_TOKEN, _FIRST_TOKEN_S, "Time from the arrival of a request to its first token."),
        (GAP, _TOKEN_S, "Time between tokens of a request; tokens that arrive together share the time equally."),
        (_MEAN_GAP, _TOKEN_S, "Mean time between tokens of a finished request that has two or more."),
        (_E2E, _REQUEST_S, "Time from the arrival of a request to its end."),
        (
            _QUEUE,
            _REQUEST_S,
            "Time from the arrival of a request to its first step, in the queues of router and engine.",
        ),
        (_INFERENCE, _REQUEST_S, "Time from the first step of a request to its last token."),
        (_PREFILL, _REQUEST_S, "Time from the first step of a request to its first token."),
        (_DECODE, _REQUEST_S, "Time from the first token of a request to its last one."),
        (_PROMPT, lengths, "Prompt tokens of a finished request."),
        (_COMPUTED, lengths, "Prompt tokens of a finished request that were not in the prefix cache."),
        (_GENERATED, lengths, "Output tokens of a finished request."),
        (_LONGEST, lengths, "Tokens of the longest output of a prompt (of its n)."),
        (_MAX_TOKENS, lengths, "The max_tokens of a finished request."),
        (_N, _OUTPUTS, "Outputs of a prompt (its n)."),
        (_PREEMPTIONS, _FEW, "How often a finished request was preempted, on the replica that finished it."),
    ]
    return {name: MetricFamily(name, "histogram", about, LABELS, bounds) for name, bounds, about in table}


COUNTERS = {
    name: MetricFamily(name, "counter", about, LABELS)
    for name, about in (
        (PROMPT_TOKENS, "Tokens of prompts that were computed, cached ones included."),
        (CACHED_TOKENS, "Prompt tokens that were found in the prefix cache."),
        (GENERATED_TOKENS, "Tokens that were generated and sent to clients."),
    )
}


@dataclass(slots=True)
class _RequestRecord:
    """A request that has not ended. Times are those of the clock of RequestMetrics, durations in seconds."""

    arrival: float
    prompt: int
    max_tokens: int
    group: int
    replica: int = -1  # that had the request last
    dispatched: float = 0.0  # when it was given to that replica
    waited: float = 0.0  # in the queue of the engine
    first: float = 0.0  # when its first token arrived; 0: not yet
    last: float = 0.0  # when its latest token arrived
    tokens: int = 0
    cached: int = 0
    stopped: bool = False  # by a stop text


@dataclass(slots=True)
class _Group:
    """The outputs of one prompt."""

    outputs: int = 0
    open: int = 0
    longest: int = -1  # tokens of the longest finished output; -1: none has finished


class _Engine:
    """The counts of one replica, over all restarts."""

    def __init__(self, families: dict[str, MetricFamily]) -> None:
        self.histograms = {name: Histogram(family.bounds) for name, family in families.items()}
        self.first_token = self.histograms[FIRST_TOKEN]
        self.gap = self.histograms[GAP]
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generated_tokens = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "histograms": {name: [each.counts, each.total] for name, each in self.histograms.items()},
            "counters": {
                PROMPT_TOKENS: self.prompt_tokens,
                CACHED_TOKENS: self.cached_tokens,
                GENERATED_TOKENS: self.generated_tokens,
            },
        }


class RequestMetrics:
    """The `protocols.Recorder` behind /metrics.

    A request that continues on another replica is counted once. Its first token is the first one that the client got;
    tokens are counted at the replica that generated them, its end at the replica that ended it.

    All calls come from the thread of the fleet server; other threads and processes ask through the verbs.
    """

    def __init__(self, max_model_len: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_model_len = max_model_len
        self._families = histogram_families(max_model_len)
        self._clock = clock
        self._records: dict[int, _RequestRecord] = {}
        self._groups: dict[int, _Group] = {}
        self._engines: dict[int, _Engine] = {}
        self._ends: Counter[tuple[int, Finish]] = Counter()
        self._refused: Counter[RefusalKind] = Counter()
        self._http = HttpCounts()
        self._api_restarts = 0

    @property
    def followed(self) -> int:
        """The number of requests and groups that have not ended."""
        return len(self._records) + len(self._groups)

    @property
    def verbs(self) -> dict[str, Callable[[bytes], bytes]]:
        """Handlers for a fleet server. The payload of both is what an API server has counted since its last call."""
        return {"metrics": self._report, "http": self._take_http}

    def _report(self, payload: bytes) -> bytes:
        """Return all numbers so far as JSON; `metrics_page.page_of` makes the text, which takes longer."""
        self._http.take_over(payload)
        numbers = {
            "max_model_len": self._max_model_len,
            "engines": {number: engine.to_json() for number, engine in self._engines.items()},
            "ends": [[number, REASONS[finish], count] for (number, finish), count in self._ends.items()],
            "refused": {REFUSALS[refusal]: count for refusal, count in self._refused.items()},
            "http": self._http.to_json(),
            "api_server_restarts": self._api_restarts,
            "process": facts_of_this_process(),
        }
        return json.dumps(numbers, separators=(",", ":")).encode()

    def note_api_restart(self) -> None:
        """Count a restart of an API server."""
        self._api_restarts += 1

    def _take_http(self, payload: bytes) -> bytes:
        self._http.take_over(payload)
        return b""

    # --- the recorder ------------------------------------------------------------------------------------------------

    def added(self, request: EngineRequest) -> None:
        prompt = request.num_prompt_tokens
        arrival = request.arrival or self._clock()
        self._records[request.seq] = _RequestRecord(arrival, prompt, request.max_tokens, request.group)
        if request.group >= 0:
            group = self._groups.setdefault(request.group, _Group())
            group.outputs += 1
            group.open += 1

    def dispatched(self, seq: int, replica: int) -> None:
        life = self._records.get(seq)
        if life is None:
            return
        life.replica = replica
        if not life.tokens:
            life.dispatched = self._clock()

    def updated(self, replica: int, update: SeqUpdate) -> None:
        life = self._records.get(update.seq)
        if life is None:
            return
        count = len(update.tokens)
        if count:
            now = self._clock()
            engine = self._engines.get(replica) or self._add_engine(replica)
            engine.generated_tokens += count
            if life.tokens:
                engine.gap.observe((now - life.last) / count, count)
            else:
                self._begin(engine, life, update, now)
            life.tokens += count
            life.last = now
        if update.finish is not None:
            self._end(life, update)

    def stopped(self, seq: int) -> None:
        life = self._records.get(seq)
        if life is not None:
            life.stopped = True

    def ended(self, update: SeqUpdate) -> None:
        life = self._records.get(update.seq)
        if life is not None:
            self._end(life, update)

    def _add_engine(self, number: int) -> _Engine:
        self._engines[number] = _Engine(self._families)
        return self._engines[number]

    def _begin(self, engine: _Engine, life: _RequestRecord, update: SeqUpdate, now: float) -> None:
        life.first = now
        life.waited = update.waited_us / 1e6
        life.cached = update.cached_tokens
        engine.first_token.observe(max(0.0, now - life.arrival))
        engine.prompt_tokens += life.prompt
        engine.cached_tokens += life.cached

    def _end(self, life: _RequestRecord, update: SeqUpdate) -> None:
        del self._records[update.seq]
        finish = Finish.ABORT if update.finish is None else update.finish
        if life.stopped and finish is Finish.ABORT:
            finish = Finish.STOP
        finished = not update.error
        if finished:
            self._ends[life.replica, finish] += 1
        else:
            self._refused[update.refusal or RefusalKind.FAILED] += 1
        if finished and life.replica >= 0:
            engine = self._engines.get(life.replica) or self._add_engine(life.replica)
            engine.histograms[_PREEMPTIONS].observe(update.preemptions)
            self._note_finished(engine, life)
        self._leave_group(life, finished=finished)

    def _note_finished(self, engine: _Engine, life: _RequestRecord) -> None:
        found = engine.histograms
        found[_E2E].observe(max(0.0, self._clock() - life.arrival))
        found[_PROMPT].observe(life.prompt)
        found[_GENERATED].observe(life.tokens)
        found[_MAX_TOKENS].observe(life.max_tokens)
        if not life.tokens:
            return
        # The clocks of event loops are coarser than ours: no time may be negative, and the sum must be the whole.
        begun = min(max(life.dispatched + life.waited, life.arrival), life.first)
        found[_QUEUE].observe(max(0.0, begun - life.arrival))
        found[_PREFILL].observe(life.first - begun)
        found[_DECODE].observe(life.last - life.first)
        found[_INFERENCE].observe(life.last - begun)
        found[_COMPUTED].observe(max(0, life.prompt - life.cached))
        if life.tokens > 1:
            found[_MEAN_GAP].observe((life.last - life.first) / (life.tokens - 1))

    def _leave_group(self, life: _RequestRecord, *, finished: bool) -> None:
        """Note the end of an output. With the last output of a prompt, the prompt is counted."""
        group = self._groups.get(life.group) or _Group(outputs=1, open=1)
        group.open -= 1
        if finished:
            group.longest = max(group.longest, life.tokens)
        if group.open:
            return
        self._groups.pop(life.group, None)
        if group.longest >= 0 and life.replica >= 0:
            engine = self._engines.get(life.replica) or self._add_engine(life.replica)
            engine.histograms[_N].observe(group.outputs)
            engine.histograms[_LONGEST].observe(group.longest)
