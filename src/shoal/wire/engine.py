"""Messages between an engine and its client. The client is a front end or a fleet."""

from enum import IntEnum
from typing import Any

import msgspec

from shoal.activity import Activity
from shoal.errors import RequestError
from shoal.wire.base import Ids, Stop, Wire, replace_fields
from shoal.wire.plan import EnginePlan
from shoal.wire.ranks import PromptLogprobs, RankStats, Sampling, TokenLogprobs
from shoal.wire.tokens import num_tokens
from shoal.wire.trace import SetTracing, TraceEvents
from shoal.wire.traffic import Traffic


class Finish(IntEnum):
    """The reason why an output ended."""

    STOP = 0
    LENGTH = 1
    ABORT = 2


class RefusalKind(IntEnum):
    """The kind of error that ended a request, for the error type and HTTP status that its client gets."""

    NONE = 0  # no error
    INVALID = 1  # the request is wrong; its sender can correct it
    FULL = 2  # the queue is full
    LATE = 3  # the request waited too long, or its deadline has passed
    FAILED = 4  # something that the request needs has failed, or the request makes replicas crash
    CLOSING = 5  # the server is draining or closing and accepts no new requests
    LOST = 6  # no replica is left to run the request
    ASLEEP = 7  # the engine sleeps: weights and KV cache are not in memory


class EngineRequest(Wire, frozen=True):
    """A request for one output. A prompt with n outputs is n requests of one group."""

    seq: int  # the number of the request; the client chooses it and never uses it twice
    tokens: bytes  # the prompt, and the tokens that the output has if the request is continued (`wire.tokens`)
    num_prompt_tokens: int  # the length of the prompt; `tokens` after it belong to the output
    sampling: Sampling
    max_tokens: int  # the most tokens that the output may have
    stop_ids: bytes = b""  # tokens that end the output (`wire.tokens`)
    priority: int = 0  # a request with a lower number runs first
    deadline: float | None = None  # time.monotonic() of the host that runs the fleet; the request is aborted then
    cache_salt: str = ""  # requests share cached prefixes only with requests of the same salt
    group: int = -1  # requests of one prompt, which share its blocks even without a prefix cache; -1: no group
    grammar: str = ""  # the grammar that the output must obey, in llguidance's form; "": none
    arrival: float = 0.0  # time.monotonic() of the client's host when the request arrived; 0: the time when it is added
    replica: int = -1  # the only replica that may run it; -1: any
    outputs: int = 1  # outputs that the client asked for at once, this one included: all are accepted, or none
    name: str = ""  # the name that its client knows it by, for traces

    @property
    def num_tokens(self) -> int:
        """The number of tokens of the prompt and of the output so far."""
        return num_tokens(self.tokens)

    @property
    def num_output_tokens(self) -> int:
        """The number of output tokens that another engine has drawn."""
        return self.num_tokens - self.num_prompt_tokens


class Abort(Wire, frozen=True):
    """The end of some requests, before they are complete. An engine ignores numbers that it does not know."""

    seqs: Ids
    stopped: bool = False  # True: the outputs are complete, as they reached a stop text; for the metrics


class SeqUpdate(Wire, frozen=True):
    """New tokens of a request, its end, or both."""

    seq: int
    tokens: Ids  # the new tokens
    logprobs: tuple[TokenLogprobs, ...] = ()  # one for each new token, if they were asked for
    finish: Finish | None = None  # not None: the request has ended, and this is its last update
    cached_tokens: int = 0  # tokens of the prompt that the prefix cache had
    error: str = ""  # the error that ended the request; "": none
    prompt_logprobs: PromptLogprobs | None = None
    refusal: RefusalKind = RefusalKind.NONE  # the kind of `error`
    waited_us: int = 0  # in the first update with tokens: microseconds in the engine before the request's first step
    preemptions: int = 0  # in the last update: how many times the request was preempted
    param: str | None = None  # this and the fields below are those of the `RequestError` of an INVALID request
    code: str | None = None
    subject: str = ""

    @classmethod
    def invalid(cls, seq: int, error: RequestError) -> "SeqUpdate":
        """Return the only update of a request that is refused because its sender made a mistake."""
        return replace_fields(cls(seq, (), finish=Finish.ABORT), **error_fields(error))

    def request_error(self) -> RequestError:
        """Return the error of an INVALID request."""
        return RequestError(self.error, self.param, self.code, subject=self.subject)


def error_fields(error: RequestError | str, refusal: RefusalKind = RefusalKind.INVALID) -> dict[str, Any]:
    """Return the fields of a `SeqUpdate` that ends a request with an error.

    Args:
        error: a `RequestError` if the request is INVALID, else a message.
        refusal: the kind of an error that is given as a message.
    """
    if isinstance(error, str):
        return {"error": error, "refusal": refusal}
    return {
        "error": error.message,
        "refusal": RefusalKind.INVALID,
        "param": error.param,
        "code": error.code,
        "subject": error.subject,
    }


class Updates(Wire, frozen=True):
    """Updates of the requests of one client."""

    updates: tuple[SeqUpdate, ...]
    base: int = 0  # subtracted from a `seq`, it gives the client's own number of the request


class NoPlan(Wire, frozen=True):
    """The first message to an engine instead of its plan: it cannot be planned. The engine answers with a failure."""

    error: str
    user_error: bool


class NodesAwaited(Wire, frozen=True):
    """A note of an engine that is starting: it awaits the nodes of its plan at an address."""

    address: str  # host:port
    start: str  # marks this start of the engine; nodes give it when they come


class EngineFailure(Wire, frozen=True):
    """The last message of an engine that cannot go on."""

    error: str
    user_error: bool = False  # True: the user can correct it


class StatsQuery(Wire, frozen=True):
    """A question for the stats of an engine. The answer is an EngineStats."""


class EngineStats(Wire, frozen=True):
    """The counters of an engine, or their sums over a set of replicas. Counters count from the engine's start."""

    waiting: int  # requests that wait for their first step, or to start again after a preemption
    running: int
    num_blocks: int
    free_blocks: int
    block_size: int
    max_model_len: int  # the most tokens that a prompt and its output may have together
    steps: int
    prompt_tokens: int  # tokens of the prompts whose computation has begun
    generated_tokens: int
    prefix_queries: int  # tokens looked up in the prefix cache
    prefix_hits: int  # tokens found in the prefix cache
    preemptions: int
    draft_tokens: int  # tokens proposed by speculative decoding
    accepted_tokens: int  # draft tokens that the model accepted
    schedule_us: int  # microseconds of scheduling
    step_total_us: int  # microseconds of steps, as a rank of the last stage measures them (see StepTimes)
    step_forward_us: int  # the part of `step_total_us` that forward passes took
    start_s: tuple[tuple[str, float], ...] = ()  # the start phases, and how many seconds each took
    ranks: tuple[RankStats, ...] = ()
    replicas: tuple["EngineStats", ...] = ()  # stats of each replica, if the other fields are sums over a set of them
    iteration_tokens: Ids = ()  # element i: the number of steps with at most 2**i tokens, and more than half of that
    step_tokens: int = 0  # tokens computed in all steps
    drafts: int = 0  # how many times drafts were made for a sequence
    busy_before: Ids = ()  # by rank: microseconds of work before the last restart of this replica, or of this rank
    accepted_by_position: Ids = ()  # element i: how many drafts in position i of their sequence's drafts were accepted
    activity: Activity = Activity()
    rank_replacements: int = 0  # ranks that were replaced alone, after their processes had died or hung
    traffic_before: tuple[Traffic, ...] = ()  # what ranks exchanged before the last restart, or before one was replaced
    trouble: str = ""  # why the engine computes nothing at present, although it has not failed: ranks are replaced


class Snapshot(Wire, frozen=True):
    """The stats that an engine sends from time to time without being asked, with the latest stats of its ranks."""

    stats: EngineStats


class SetActivity(Wire, frozen=True):
    """A request to an engine to be awake, paused or asleep from now on.

    The answer is a ControlReply. With an error in it, the engine is in the same state as before. After the answer to a
    pause nothing is computed any more.
    """

    id: int
    activity: Activity


class ResetPrefixCache(Wire, frozen=True):
    """A request to an engine to empty its prefix cache. The answer is a ControlReply with a ResetOutcome."""

    id: int
    running: bool = False  # True: running requests compute their blocks again too


EngineOrder = SetActivity | ResetPrefixCache
"""An order to an engine, which it answers with a ControlReply."""


class ResetOutcome(Wire, frozen=True):
    """The outcome of emptying a prefix cache."""

    forgotten: int = 0  # blocks that were in the cache
    held: int = 0  # blocks that running requests still use


class ControlCall(Wire, frozen=True):
    """A question or an order of a client, other than a request: `status`, `metrics`, `scale`, ..."""

    id: int
    verb: str
    payload: bytes = b""


class ControlReply(Wire, frozen=True):
    """The answer to a ControlCall, a SetActivity or a ResetPrefixCache."""

    id: int
    payload: bytes = b""
    error: str = ""  # not empty: it failed
    user_error: bool = False  # True: the sender of the order or call can correct the error


ToEngine = EnginePlan | NoPlan | EngineRequest | Abort | StatsQuery | Stop | ControlCall | EngineOrder | SetTracing

FromEngine = Updates | EngineStats | EngineFailure | Snapshot | ControlReply | NodesAwaited | TraceEvents

to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)

from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)

reset_outcome_decoder: msgspec.msgpack.Decoder[ResetOutcome] = msgspec.msgpack.Decoder(ResetOutcome)
