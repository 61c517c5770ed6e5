"""Messages between an engine and its ranks.

Plans are deltas: a rank remembers its sequences, so a plan names only what is new. All messages to a rank share one
ordered queue, and every rank sees the same order."""

import msgspec

from shoal.wire.base import Ids, Stop, Wire
from shoal.wire.plan import EnginePlan, RankPlan


class SamplingPenalties(Wire, frozen=True):
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
    penalties: SamplingPenalties | None = None
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


class RankSetup(Wire, frozen=True):
    """The first message to a rank: the plan of its replica, and which of the plan's ranks it is."""

    wire_version: int
    incarnation: int
    rank: int
    plan: EnginePlan

    @property
    def mine(self) -> RankPlan:
        return self.plan.ranks[self.rank]

    @property
    def world_size(self) -> int:
        """Ranks of the replica."""
        return len(self.plan.ranks)

    @property
    def global_rank(self) -> int:
        """The number among the ranks of all replicas."""
        return self.plan.layout.replica * self.world_size + self.rank


class RankCall(Wire, frozen=True):
    """A verb with an argument, ordered with plans: the start phases, and whatever all ranks do together later."""

    id: int
    verb: str
    payload: bytes = b""


class RankReply(Wire, frozen=True):
    id: int
    rank: int
    payload: bytes


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


ToRank = RankSetup | StepPlan | StepMask | RankCall | Stop

FromRank = StepResult | RankReply | Pulse | RankReport


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


to_rank: msgspec.msgpack.Decoder[ToRank] = msgspec.msgpack.Decoder(ToRank)

from_rank: msgspec.msgpack.Decoder[FromRank] = msgspec.msgpack.Decoder(FromRank)

_load_info = msgspec.msgpack.Decoder(LoadInfo)

_capacity = msgspec.msgpack.Decoder(Capacity)

_rank_stats = msgspec.msgpack.Decoder(RankStats)


def decode_load_info(payload: bytes) -> LoadInfo:
    return _load_info.decode(payload)


def decode_capacity(payload: bytes) -> Capacity:
    return _capacity.decode(payload)


def decode_rank_stats(payload: bytes) -> RankStats:
    return _rank_stats.decode(payload)
