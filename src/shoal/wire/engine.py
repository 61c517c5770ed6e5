"""Messages between an engine and its client, which is a front end or a fleet."""

from enum import IntEnum

import msgspec

from shoal.activity import Activity
from shoal.wire.base import Ids, Stop, Wire
from shoal.wire.plan import EngineSetup
from shoal.wire.ranks import PromptLogprobs, RankStats, Sampling, TokenLogprobs
from shoal.wire.tokens import num_tokens


class Finish(IntEnum):
    STOP = 0
    LENGTH = 1
    ABORT = 2


class RefusalKind(IntEnum):
    """The kind of `error` that ended a request."""

    NONE = 0
    INVALID = 1  # it can't be run as it is; whoever sent it can change it
    FULL = 2  # too many wait already
    LATE = 3  # it waited too long, or its deadline has passed
    FAILED = 4  # what it needs has failed, or replicas die of it
    CLOSING = 5  # nothing new is taken any more
    LOST = 6  # no replica is left that could run it
    ASLEEP = 7  # weights and KV cache were given back


class EngineRequest(Wire, frozen=True):
    seq: int  # chosen by the client, never used twice
    tokens: bytes  # of the prompt, and of the output so far if the request goes on from there; see wire.tokens
    num_prompt_tokens: int  # those behind are of the output
    sampling: Sampling
    max_tokens: int
    stop_ids: bytes = b""  # as `tokens`
    priority: int = 0  # lower runs first
    deadline: float | None = None  # time.monotonic() of the host; a request beyond it is aborted
    cache_salt: str = ""  # only requests with the same salt share cached prefixes
    group: int = -1  # requests of one prompt, which share its blocks even without a prefix cache; -1: alone
    grammar: str = ""  # what the output must look like, in llguidance's form
    arrival: float = 0.0  # time.monotonic() of the client's host when it arrived; 0: when it is added
    replica: int = -1  # the only one that may run it; -1: any
    outputs: int = 1  # how many its client has asked for at once, this one included; all are taken, or none

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt, and of the output so far."""
        return num_tokens(self.tokens)

    @property
    def num_output_tokens(self) -> int:
        """Tokens of the output that another engine has drawn."""
        return self.num_tokens - self.num_prompt_tokens


class Abort(Wire, frozen=True):
    """Requests to end. `stopped`: their outputs have reached a stop text, so their clients have all they wanted."""

    seqs: Ids
    stopped: bool = False


class SeqUpdate(Wire, frozen=True):
    """New tokens of a request's output. `finish` is set in the last one."""

    seq: int
    tokens: Ids
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: Finish | None = None
    cached_tokens: int = 0  # tokens of the prompt that were in the prefix cache
    error: str = ""
    prompt_logprobs: PromptLogprobs | None = None
    refusal: RefusalKind = RefusalKind.NONE
    waited_us: int = 0  # with the first tokens: how long the engine had the request before it was in a step
    preemptions: int = 0  # with the end: how often the request gave its blocks back


class Updates(Wire, frozen=True):
    updates: tuple[SeqUpdate, ...]


class EngineFailure(Wire, frozen=True):
    error: str
    user_error: bool = False


class StatsQuery(Wire, frozen=True):
    pass


class EngineStats(Wire, frozen=True):
    """A snapshot. Durations in microseconds, counters since the start."""

    waiting: int
    running: int
    num_blocks: int
    free_blocks: int
    block_size: int
    max_model_len: int
    steps: int
    prompt_tokens: int
    generated_tokens: int
    prefix_queries: int  # tokens looked up in the prefix cache
    prefix_hits: int  # ... and found
    preemptions: int
    draft_tokens: int  # of speculative decoding
    accepted_tokens: int  # ... that were right
    schedule_us: int
    step_total_us: int
    step_forward_us: int
    start_s: tuple[tuple[str, float], ...] = ()
    ranks: tuple[RankStats, ...] = ()
    replicas: tuple["EngineStats", ...] = ()  # of a set of replicas; the other fields are their sums
    iteration_tokens: Ids = ()  # steps by their tokens: number i had up to 2**i, and more than half as many
    step_tokens: int = 0  # tokens of all steps
    drafts: int = 0  # how often a sequence had drafts in a step
    busy_before: Ids = ()  # microseconds that each rank was busy in earlier incarnations of the engine
    accepted_by_position: Ids = ()  # drafts that were right, by their place among those of a step
    activity: Activity = Activity()


class Snapshot(Wire, frozen=True):
    """An engine's own numbers and the last ones of its ranks, sent unasked now and then."""

    stats: EngineStats


class Become(Wire, frozen=True):
    """A change of an engine's activity. The answer is a Told; with an error in it, nothing has changed. When a pause is
    answered nothing is computed any more."""

    id: int
    activity: Activity


class ResetCache(Wire, frozen=True):
    """A command to forget the prefix cache. `running`: running requests give their blocks back too, and compute their
    tokens again. The answer is a Told with a CacheReset."""

    id: int
    running: bool = False


class CacheReset(Wire, frozen=True):
    """The effect of a ResetCache: `forgotten` blocks could have been found, `held` ones stay with their requests."""

    forgotten: int = 0
    held: int = 0


class Ask(Wire, frozen=True):
    """A question or a command of a client, beside requests: `status`, `metrics`, `scale`, ..."""

    id: int
    verb: str
    payload: bytes = b""


class Told(Wire, frozen=True):
    """The answer to an Ask, a Become or a ResetCache. `user_error`: the error is one that whoever asked can avoid."""

    id: int
    payload: bytes = b""
    error: str = ""
    user_error: bool = False


ToEngine = EngineSetup | EngineRequest | Abort | StatsQuery | Stop | Ask | Become | ResetCache

FromEngine = Updates | EngineStats | EngineFailure | Snapshot | Told

to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)

from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)

cache_reset_decoder: msgspec.msgpack.Decoder[CacheReset] = msgspec.msgpack.Decoder(CacheReset)
