"""The messages between engine, ranks and clients. Encoded with msgpack; versioned as a whole by WIRE_VERSION.

Plans are deltas: a rank remembers its sequences, so a plan names only what is new. All messages to a rank share one
ordered queue, and every rank sees the same order.
"""

from enum import IntEnum
from typing import Any, TypeVar

import msgspec

from shoal.activity import Activity

WIRE_VERSION = 6

Ids = tuple[int, ...]


class Wire(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of all messages: positional fields, tagged by the class name."""


# --- what the engine decides -------------------------------------------------------------------------------------


class Penalties(Wire, frozen=True):
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0


class Sampling(Wire, frozen=True):
    """Resolved sampling parameters: the seed is set, so that any rank, replica or replay draws the same; texts have
    become token ids. Lists that may be as long as a vocabulary are bytes, as tokens are: int32, little endian."""

    seed: int  # 64 bits
    sample_index: int = 0
    temperature: float = 0.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    penalties: Penalties | None = None
    min_tokens: int = 0  # before so many are there, `ends` are never drawn
    ends: bytes = b""  # end-of-text and stop tokens
    bias_ids: bytes = b""
    bias_values: bytes = b""  # float32, little endian: one for each of them
    allowed: bytes | None = None  # None: all
    banned: tuple[Ids, ...] = ()  # never complete one of these
    logprobs: int = -1  # -1: none
    prompt_logprobs: int = -1  # -1: none


class NewSeq(Wire, frozen=True):
    """Admission, and resumption after preemption: the same message with the tokens so far."""

    seq: int
    epoch: int
    tokens: bytes  # int32, little endian
    prompt_len: int
    blocks: Ids  # KV blocks that hold computed tokens already (prefix cache)
    sampling: Sampling


class Work(Wire, frozen=True):
    """Compute `count` tokens of `seq` from position `start`; `blocks` are appended to its table first.

    The last `len(drafts)` of them are guesses at what comes next. The rank draws a token behind the last known one and
    behind every guess, and keeps as many as the guesses were right, and one more.
    """

    seq: int
    start: int
    count: int
    sample: bool
    blocks: Ids = ()
    drafts: Ids = ()
    masked: bool = False  # the step's mask has rows for it: one for each token that may be drawn


class StepPlan(Wire, frozen=True):
    """If any work is `masked`, the next message to the rank is the step's StepMask."""

    incarnation: int
    step: int
    work: tuple[Work, ...]
    new: tuple[NewSeq, ...] = ()
    released: Ids = ()  # sequences to forget, before `new` is read
    lockstep: bool = False  # ranks of other replicas take part: even without work there is something to do

    @property
    def masked(self) -> bool:
        return any(work.masked for work in self.work)


class StepMask(Wire, frozen=True):
    """Which tokens may be drawn, for the masked works of a step in their order: made while the step is computed."""

    incarnation: int
    step: int
    bits: bytes  # a row of 32-bit words each, little endian, the lowest bit first; 1: allowed
    words: int  # in a row


class TokenLogprobs(Wire, frozen=True, gc=False):  # a long output has a great many, and none is part of a cycle
    """Of one token: its own log-probability and rank (1: the likeliest), and the likeliest tokens with theirs."""

    chosen: float
    rank: int
    ids: Ids
    values: tuple[float, ...]


class PromptLogprobs(Wire, frozen=True):
    """Of the prompt's tokens from position `start` on."""

    start: int
    entries: tuple[TokenLogprobs, ...]


class SeqOut(Wire, frozen=True):
    seq: int
    epoch: int
    tokens: Ids
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: PromptLogprobs | None = None
    drafts: Ids = ()  # a draft model's guesses at what follows


class StepTimes(Wire, frozen=True):
    """Microseconds a rank of the last stage spent on a step: everything it did, and the forward pass alone. Waits for
    other stages are none of it; those for other ranks of the stage are."""

    total_us: int
    forward_us: int


class StepResult(Wire, frozen=True):
    incarnation: int
    step: int
    out: tuple[SeqOut, ...]
    times: StepTimes


# --- executor and ranks ------------------------------------------------------------------------------------------


class RankSetup(Wire, frozen=True):
    """All that one rank is told before it loads anything."""

    wire_version: int
    rank: int
    world_size: int
    incarnation: int
    model_path: str
    model_impl: str  # "shoal" or "transformers"
    tp: int  # ranks that share each layer; neighbours, and the stages follow each other
    tp_split: Ids  # relative shares of the tensor-parallel ranks, empty: equal ones
    stages: Ids  # layers of each pipeline stage
    load_format: str
    dtype: str
    device: str
    device_index: int
    seed: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    cores: Ids  # cores this rank may use, empty: all
    threads: int
    kv_budget: int | None  # bytes for the KV cache, None: what the device has left
    memory_utilization: float  # of the device's memory, where the rank measures what is left
    comm_timeout_s: float
    cost_share: float = 1.0  # of what a token costs in all ranks of the replica, an estimate
    max_in_flight: int = 2  # plans that are out at a time, at most
    dp_rank: int = 0  # the replica's number
    dp_size: int = 1
    experts: str = ""  # how whole experts are placed: "linear" or "round_robin"; "": all of them are cut
    all2all: str = ""  # how tokens reach them
    group_store: str = ""  # host:port of the rendezvous where ranks of all replicas find each other, "": never
    group_key: str = ""  # the shared secret that is asked for there
    address: str = "127.0.0.1"  # of this host, as other ranks reach it
    meeting: int = 0  # which of those that these replicas have at the rendezvous
    draft_model_path: str = ""  # of speculative decoding
    num_drafts: int = 0  # tokens it guesses at a time
    file_state: str = ""  # of the model's files, as the engine has read them; "": whatever is there
    draft_file_state: str = ""
    overrides: str = "{}"  # JSON that stands over the model's config.json
    draft_overrides: str = "{}"  # ... and over the draft model's

    @property
    def global_rank(self) -> int:
        """Among the ranks of all replicas."""
        return self.dp_rank * self.world_size + self.rank


class Call(Wire, frozen=True):
    """A verb with an argument, ordered with plans: the start phases, and whatever all ranks do together later."""

    id: int
    verb: str
    payload: bytes = b""


class Reply(Wire, frozen=True):
    id: int
    rank: int
    payload: bytes


class Stop(Wire, frozen=True):
    pass


class Pulse(Wire, frozen=True):
    """A rank is alive. `doing` is what it is at, for the error that names it; `step` the last one it ended."""

    rank: int
    step: int
    doing: str


class RankReport(Wire, frozen=True):
    """A rank could not do what it was asked. It takes no more work."""

    rank: int
    step: int
    error: str
    user_error: bool = False  # something that the user can mend
    communication: bool = False  # it was waiting for other ranks, one of which may be the cause


ToRank = RankSetup | StepPlan | StepMask | Call | Stop
FromRank = StepResult | Reply | Pulse | RankReport


# --- start phases ------------------------------------------------------------------------------------------------


class LoadInfo(Wire, frozen=True):
    """What a rank holds after `load`."""

    rank: int
    device: str
    first_layer: int
    layers: int
    q_heads: int
    kv_heads: int
    experts: int  # in each layer that has experts
    weight_bytes: int
    threads: int
    kernels: str
    linear: str
    comm: str


class Capacity(Wire, frozen=True):
    """After `profile`: how many KV blocks of how many bytes fit."""

    rank: int
    num_blocks: int
    block_bytes: int


class Traffic(Wire, frozen=True):
    """What a rank has said to others by one operation since its start."""

    axis: str
    operation: str
    count: int
    sent_bytes: int  # to other ranks, as the operation asks for it; what the backend makes of it may be more


class RankStats(Wire, frozen=True):
    """Memory of a rank, in bytes. `anonymous` is what no file backs (of the whole process, where ranks are threads);
    `kv_bytes` of it are pages of the KV cache that have been written."""

    rank: int
    pid: int
    anonymous: int
    anonymous_at_import: int
    kv_bytes: int
    weight_bytes: int
    stage: int = 0
    busy_us: int = 0  # in steps, since the start, with waits for ranks of the same stage, here and in other replicas
    traffic: tuple[Traffic, ...] = ()


# --- clients of an engine ----------------------------------------------------------------------------------------


class Finish(IntEnum):
    STOP = 0
    LENGTH = 1
    ABORT = 2


class Refusal(IntEnum):
    """What kind of `error` ended a request."""

    NONE = 0
    INVALID = 1  # it can't be run; whoever sent it can mend it
    FULL = 2  # too many wait already
    LATE = 3  # it waited too long, or its deadline has passed
    FAILED = 4  # what it needs has failed, or it takes down whoever runs it
    CLOSING = 5  # nothing new is taken any more
    LOST = 6  # no replica is left that could run it
    ASLEEP = 7  # weights and KV cache were given back


class EngineRequest(Wire, frozen=True):
    seq: int  # chosen by the client, never used twice
    tokens: bytes  # int32, little endian
    sampling: Sampling
    max_tokens: int
    stop_ids: bytes = b""  # int32, little endian
    priority: int = 0  # lower runs first
    deadline: float | None = None  # time.monotonic() of the host; a request beyond it is aborted
    cache_salt: str = ""  # only requests with the same salt share cached prefixes
    prompt_len: int = 0  # tokens behind it are of the output: the request goes on from there; 0: all are the prompt's
    group: int = -1  # requests of one prompt, which share its blocks even without a prefix cache; -1: alone
    grammar: str = ""  # what the output must look like, in llguidance's form
    arrival: float = 0.0  # time.monotonic() of the client's host when it came; 0: when it is added
    replica: int = -1  # the only one that may run it; -1: any
    outputs: int = 1  # that its client has asked for at once, this one included: all of them are taken, or none


class Abort(Wire, frozen=True):
    """`stopped`: their clients have all they wanted, up to a stop text."""

    seqs: Ids
    stopped: bool = False


class SeqUpdate(Wire, frozen=True):
    seq: int
    tokens: Ids
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: Finish | None = None
    cached_tokens: int = 0
    error: str = ""
    prompt_logprobs: PromptLogprobs | None = None
    refusal: Refusal = Refusal.NONE
    waited_us: int = 0  # with the first tokens: how long the engine had it before it was in a step
    preemptions: int = 0  # with the end: how often it gave its blocks back


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
    draft_tokens: int  # guessed by speculative decoding
    accepted_tokens: int  # ... rightly
    schedule_us: int
    step_total_us: int
    step_forward_us: int
    start_s: tuple[tuple[str, float], ...] = ()
    ranks: tuple[RankStats, ...] = ()
    replicas: tuple["EngineStats", ...] = ()  # of a set of replicas, whose sums the other fields are
    iteration_tokens: Ids = ()  # steps by their tokens: number i had up to 2**i, and more than half as many
    step_tokens: int = 0  # in all steps
    drafts: int = 0  # rounds of guessing, of a sequence each
    busy_before: Ids = ()  # microseconds that each rank was busy in former lives
    accepted_by_position: Ids = ()  # guesses that were right, by their place in a round
    activity: Activity = Activity()


class Snapshot(Wire, frozen=True):
    """Unasked, now and then: an engine's own numbers, with what its ranks said last."""

    stats: EngineStats


class Become(Wire, frozen=True):
    """What an engine is to be at from now on. Answered by a Told, with an error if it can't be, and then it is what it
    was; nothing is computed any more when a pause is answered."""

    id: int
    activity: Activity


class ResetCache(Wire, frozen=True):
    """No block shall be found by its prefix any more. `running`: requests that run compute theirs again, too. Answered
    by a Told with a CacheReset."""

    id: int
    running: bool = False


class CacheReset(Wire, frozen=True):
    """`forgotten` blocks could have been found; `held` are those that requests go on with."""

    forgotten: int = 0
    held: int = 0


class Operation(Wire, frozen=True):
    """What an operator wants of all replicas: "pause", "resume", "sleep", "wake_up" or "reset_prefix_cache". `mode`:
    what becomes of requests, "abort", "wait" (those that a replica has end first) or "keep"."""

    verb: str
    mode: str = "abort"
    level: int = 1
    tags: tuple[str, ...] | None = None  # the parts that are taken again; None: all
    clear_cache: bool = True  # at a pause, unless requests are kept
    running: bool = False  # requests compute their blocks again after `reset_prefix_cache`


class Ask(Wire, frozen=True):
    """Something that a client wants to know or to be done, beside requests: `status`, `metrics`, `scale`, ..."""

    id: int
    verb: str
    payload: bytes = b""


class Told(Wire, frozen=True):
    """The answer to an Ask, a Become or a ResetCache. `user_error`: whoever asked can mend it."""

    id: int
    payload: bytes = b""
    error: str = ""
    user_error: bool = False


class ModelFiles(Wire, frozen=True):
    """Where a model and its draft model were found, as absolute paths, and in what state their files were then. A text
    is empty where there is no such thing, or nobody has looked."""

    folder: str
    draft_folder: str = ""
    state: str = ""
    draft_state: str = ""


class ApiSetup(Wire, frozen=True):
    """The first message to an API server process: the model and its options, and what `shoal serve` was told besides.
    `sockets` are the descriptors at which it accepts connections."""

    model: str | None
    options: dict[str, Any]
    settings: dict[str, Any]
    listening: dict[str, Any]
    max_model_len: int = 0  # that the replicas have; 0: the process decides itself
    number: int = 0
    sockets: tuple[int, ...] = ()
    files: ModelFiles | None = None  # as in EngineSetup


class ReplicaState(Wire, frozen=True):
    """A replica as its supervisor sees it. `state`: "starting", "ready", "restarting" (it has ended, and waits for its
    next start), "awaited" (another host starts it), "leaving", "failed" (it is not started again)."""

    number: int
    state: str
    host: str
    pid: int
    since_s: float  # seconds in this state
    restarts: int
    cause: str  # of its last end, "" if there was none
    held: int  # requests that it has
    stats: EngineStats | None  # its latest word; counters are sums over its lives


class FleetStatus(Wire, frozen=True):
    """All replicas behind one address."""

    model: str
    tp: int  # of each replica
    pp: int
    replicas: tuple[ReplicaState, ...]
    queued: int  # requests that no replica has yet
    replays: int  # how often a request went on after the end of the replica that had it
    accepting: bool  # False: it drains, or has failed
    uptime_s: float
    failure: str = ""
    max_model_len: int = 0  # tokens of a prompt and its output; 0: not known before a replica is ready
    activity: str = "awake"  # or "paused" or "asleep"
    sleep_level: int = 0
    missing: tuple[str, ...] = ()  # of "weights" and "kv_cache", what was given back


class Turn(Wire, frozen=True):
    """Items of a stored conversation in their order: what one side said."""

    items: bytes  # a list, in JSON
    ids: tuple[str, ...]  # of those that have one


class KeepResponse(Wire, frozen=True):
    """A response to be stored. `previous`: the one that it goes on from; `before`: all up to that, in case it is not
    there any more."""

    id: str
    response: bytes  # in JSON
    said: Turn
    answer: Turn
    previous: str | None = None
    before: tuple[Turn, ...] = ()


class Turns(Wire, frozen=True):
    """What a store has, as `Turn.items`."""

    turns: tuple[bytes, ...]


class Names(Wire, frozen=True):
    names: tuple[str, ...]


class Place(Wire, frozen=True):
    """Where a replica stands among those of its data-parallel group."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the replicas on its host, which share its devices and memory
    local_size: int = 1
    memory_available: int = 0  # bytes the host had when its first replica was planned; 0: to be looked up
    rendezvous: str = ""  # host:port of where replicas in lockstep, and their ranks, meet
    key: str = ""  # shared secret of those who meet there
    address: str = "127.0.0.1"  # of this host, as others reach it
    meeting: int = 0  # which of those that these processes have there, one after the other
    returning: bool = False  # it has been ready before: who is not there any more has failed, nothing is set wrong


class EngineSetup(Wire, frozen=True):
    """The first message to an engine process: what `LLM(...)` was given. It answers with its stats when it is ready."""

    model: str | None
    options: dict[str, Any]
    place: Place = Place()
    files: ModelFiles | None = None  # None: they are still to be looked for


# --- grammars ----------------------------------------------------------------------------------------------------


class GrammarText(Wire, frozen=True):
    """The first message to the process of one grammar: what it compiles, in llguidance's form."""

    text: str


class GrammarCompiled(Wire, frozen=True):
    """Its answer. `error`: why the grammar can't be used."""

    error: str = ""


class GrammarFollow(Wire, frozen=True):
    """A new output to follow. `output`: its tokens so far. The answer is a Verdict."""

    seq: int
    output: Ids = ()


class GrammarAsk(Wire, frozen=True):
    """An output has got `tokens`; `drafts` are guesses at what comes next. The answer is a Verdict."""

    seq: int
    tokens: Ids
    drafts: Ids = ()
    masked: bool = True  # False: no more tokens are wanted, only whether the output is complete


class GrammarForget(Wire, frozen=True):
    seq: int


class Verdict(Wire, frozen=True):
    """What a grammar says of an output: of the place behind its last token, then of the place behind each draft that
    may follow (`drafts`; an end-of-text token may be the last of them)."""

    seq: int
    behind: int = 0  # tokens of the output
    refused: str = ""  # why the output can't be followed at all; everything else is empty then
    lost: str = ""  # why it is not followed any more, through no fault of its grammar: it may be followed anew
    problem: str = ""  # why the output can't be brought to an end that the grammar accepts
    ended: tuple[bool, ...] = ()  # by place: nothing may follow but an end-of-text token
    drafts: Ids = ()
    masks: bytes = b""  # a row for each place, as in a StepMask; never an empty row
    cost_us: int = 0  # processor time


class GrammarKill(Wire, frozen=True):
    """To the host of the grammars' processes: ends one, whatever it does."""

    number: int


class GrammarEnded(Wire, frozen=True):
    """From the host: a process has ended, in words. `killed`: by somebody, not by what its grammar takes."""

    number: int
    how: str
    killed: bool = False


class GrammarHostReady(Wire, frozen=True):
    """From the host: it has read the tokenizer."""


class GrammarHostFailed(Wire, frozen=True):
    """From the host, which ends: the model's tokenizer is none that grammars can be compiled for."""

    error: str


ToGrammar = GrammarText | GrammarFollow | GrammarAsk | GrammarForget
FromGrammar = GrammarCompiled | Verdict
ToGrammarHost = GrammarKill | Stop
FromGrammarHost = GrammarEnded | GrammarHostReady | GrammarHostFailed


# --- replicas and hosts that meet ----------------------------------------------------------------------------------


class Challenge(Wire, frozen=True):
    """The first word of a rendezvous to whoever connects."""

    nonce: bytes


class Hello(Wire, frozen=True):
    """Who joins which room, and what must be the same for all in it. A room that has no size is only asked."""

    room: str
    rank: int
    size: int
    host: str
    pid: int
    nonce: bytes
    agreement: dict[str, str]  # name of a version, an option, a part of the model -> value or digest


class Signed(Wire, frozen=True):
    """A Hello, and the proof that its sender knows the shared key."""

    hello: bytes
    proof: bytes


class Welcome(Wire, frozen=True):
    """The rendezvous knows the key too."""

    proof: bytes


class Refused(Wire, frozen=True):
    why: str
    again: bool = False  # it may be over soon


class Waiting(Wire, frozen=True):
    """A room is not complete yet."""

    arrived: tuple[str, ...]
    missing: Ids


class Started(Wire, frozen=True):
    """A room is complete. `members`: who they are, by rank; `formation`: how many rooms were complete before it."""

    members: tuple[str, ...]
    formation: int = 0


class Posted(Wire, frozen=True):
    """From one member to another, or to all others."""

    topic: str
    sender: int
    to: int  # -1: all others
    payload: bytes


class Gone(Wire, frozen=True):
    """A member has left a room that was complete. `why` is empty if it had ended its work."""

    rank: int
    why: str


class Leave(Wire, frozen=True):
    why: str = ""


class Alive(Wire, frozen=True):
    pass


class StoreSet(Wire, frozen=True):
    """Answered, like all that is said to the store, by a StoreValue. Not set if the key is there and `expected` is
    another value."""

    key: str
    value: bytes
    expected: bytes | None = None


class StoreAdd(Wire, frozen=True):
    key: str
    amount: int


class StoreGet(Wire, frozen=True):
    """The value of the last key, once all are there; if it shall not `wait`, nothing while one is missing."""

    keys: tuple[str, ...]
    wait: bool


class StoreDelete(Wire, frozen=True):
    key: str


class StoreValue(Wire, frozen=True):
    value: bytes | None


ToRendezvous = Signed | Posted | Leave | Alive | StoreSet | StoreAdd | StoreGet | StoreDelete
FromRendezvous = Challenge | Welcome | Refused | Waiting | Started | Posted | Gone | Alive | StoreValue

ToEngine = EngineSetup | EngineRequest | Abort | StatsQuery | Stop | Ask | Become | ResetCache
ToApi = ApiSetup | Updates | Told | Stop
FromEngine = Updates | EngineStats | EngineFailure | Snapshot | Told

_encoder = msgspec.msgpack.Encoder()
W = TypeVar("W", bound=Wire)


def replace(message: W, **changes: Any) -> W:
    """The same message with other values in some fields."""
    return msgspec.structs.replace(message, **changes)


def encode(message: Wire) -> bytes:
    return _encoder.encode(message)


to_rank: msgspec.msgpack.Decoder[ToRank] = msgspec.msgpack.Decoder(ToRank)
from_rank: msgspec.msgpack.Decoder[FromRank] = msgspec.msgpack.Decoder(FromRank)
to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
to_api: msgspec.msgpack.Decoder[ToApi] = msgspec.msgpack.Decoder(ToApi)
from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)

to_grammar: msgspec.msgpack.Decoder[ToGrammar] = msgspec.msgpack.Decoder(ToGrammar)
from_grammar: msgspec.msgpack.Decoder[FromGrammar] = msgspec.msgpack.Decoder(FromGrammar)
to_grammar_host: msgspec.msgpack.Decoder[ToGrammarHost] = msgspec.msgpack.Decoder(ToGrammarHost)
from_grammar_host: msgspec.msgpack.Decoder[FromGrammarHost] = msgspec.msgpack.Decoder(FromGrammarHost)

to_rendezvous: msgspec.msgpack.Decoder[ToRendezvous] = msgspec.msgpack.Decoder(ToRendezvous)
from_rendezvous: msgspec.msgpack.Decoder[FromRendezvous] = msgspec.msgpack.Decoder(FromRendezvous)
hello: msgspec.msgpack.Decoder[Hello] = msgspec.msgpack.Decoder(Hello)
fleet_status: msgspec.msgpack.Decoder[FleetStatus] = msgspec.msgpack.Decoder(FleetStatus)
keep_response: msgspec.msgpack.Decoder[KeepResponse] = msgspec.msgpack.Decoder(KeepResponse)
turns: msgspec.msgpack.Decoder[Turns] = msgspec.msgpack.Decoder(Turns)
names: msgspec.msgpack.Decoder[Names] = msgspec.msgpack.Decoder(Names)
cache_reset: msgspec.msgpack.Decoder[CacheReset] = msgspec.msgpack.Decoder(CacheReset)
operation: msgspec.msgpack.Decoder[Operation] = msgspec.msgpack.Decoder(Operation)
WireError = msgspec.MsgspecError  # what decoding raises

_load_info = msgspec.msgpack.Decoder(LoadInfo)
_capacity = msgspec.msgpack.Decoder(Capacity)
_rank_stats = msgspec.msgpack.Decoder(RankStats)


def decode_load_info(payload: bytes) -> LoadInfo:
    return _load_info.decode(payload)


def decode_capacity(payload: bytes) -> Capacity:
    return _capacity.decode(payload)


def decode_stats(payload: bytes) -> RankStats:
    return _rank_stats.decode(payload)
