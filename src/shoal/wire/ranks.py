"""Messages between an engine and its ranks.

Plans are deltas: a rank remembers its sequences, so a plan names only what is new. All messages to a rank share one
ordered queue, and every rank sees the same order."""

import msgspec

from shoal.wire.base import Ids, Stop, Wire


class SamplingPenalties(Wire, frozen=True):
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0


class Sampling(Wire, frozen=True):
    """Resolved sampling parameters: the seed is set, so that any rank, replica or replay draws the same; texts have
    become token ids. Lists that may be as long as a vocabulary are bytes (wire.tokens)."""

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
    bias_values: bytes = b""  # one for each of them
    allowed: bytes | None = None  # None: all
    banned: tuple[Ids, ...] = ()  # never complete one of these
    logprobs: int = -1  # -1: none
    prompt_logprobs: int = -1  # -1: none


class NewSeq(Wire, frozen=True):
    """Admission, and resumption after preemption: the same message with the tokens so far."""

    seq: int
    epoch: int
    tokens: bytes  # see wire.tokens
    num_prompt_tokens: int
    blocks: Ids  # KV blocks that hold computed tokens already (prefix cache)
    sampling: Sampling


class Work(Wire, frozen=True):
    """Compute `count` tokens of `seq` from position `start`; `blocks` are appended to its table first.

    The last `len(drafts)` of them are drafts. The rank draws a token behind the last known one and behind every draft,
    and keeps those that are equal to their drafts, up to the first that is not, and that one.
    """

    seq: int
    start: int
    count: int
    sample: bool
    blocks: Ids = ()
    drafts: Ids = ()
    masked: bool = False  # the step's mask has rows for it: one for each token that may be drawn


class StepPlan(Wire, frozen=True):
    """The work of one step. If any of it is `masked`, the next message to the rank is the step's StepMask."""

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
    """The tokens that may be drawn for the masked works of a step, in their order; made while the step is computed."""

    incarnation: int
    step: int
    bits: bytes  # a row of 32-bit words each, little endian, the lowest bit first; 1: allowed
    words: int  # in a row


class TokenLogprobs(Wire, frozen=True, gc=False):  # a long output has a great many, and none is part of a cycle
    """Log-probabilities of one position: of the drawn token, with its rank (1: the likeliest), and of the likeliest."""

    chosen: float
    rank: int
    ids: Ids
    values: tuple[float, ...]


class PromptLogprobs(Wire, frozen=True):
    """Log-probabilities of the prompt's tokens from position `start` on."""

    start: int
    entries: tuple[TokenLogprobs, ...]


class SeqOut(Wire, frozen=True):
    seq: int
    epoch: int
    tokens: Ids
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: PromptLogprobs | None = None
    drafts: Ids = ()  # of a draft model, behind `tokens`


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
