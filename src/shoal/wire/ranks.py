"""Messages between an engine and its ranks.

Step plans are deltas: a rank remembers its sequences, so a plan says only what is new. All messages to a rank go
through one queue, and every rank gets them in the same order.
"""

import msgspec

from shoal.wire.base import Ids, Stop, Wire
from shoal.wire.credentials import Credentials
from shoal.wire.plan import EnginePlan, ModelPlan, RankPlan
from shoal.wire.traffic import Traffic


class SamplingPenalties(Wire, frozen=True):
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0


class Sampling(Wire, frozen=True):
    """The sampling parameters of a request, in the form that ranks need.

    The seed is always set, so that every rank, every replica and every replay draws the same tokens. Texts have become
    token ids. Lists that may be as long as a vocabulary are bytes: token ids as int32, little endian.
    """

    seed: int  # 64 bits
    sample_index: int = 0  # the number of this output among those of its prompt
    temperature: float = 0.0
    top_k: int = 0  # 0: no limit
    top_p: float = 1.0
    min_p: float = 0.0
    penalties: SamplingPenalties | None = None
    min_tokens: int = 0  # none of `ends` is drawn before the output has this number of tokens
    ends: bytes = b""  # end-of-text and stop tokens
    bias_ids: bytes = b""  # tokens whose logits are biased
    bias_values: bytes = b""  # the bias of each of them: float32, little endian
    allowed: bytes | None = None  # the only tokens that may be drawn; None: all tokens
    banned: tuple[Ids, ...] = ()  # runs of tokens that the output must not contain
    logprobs: int = -1  # how many of the likeliest tokens are reported for each drawn token; -1: no log-probabilities
    prompt_logprobs: int = -1  # ... and for each token of the prompt


class NewSeq(Wire, frozen=True):
    """A sequence that a rank must know from now on: a new one, or a preempted one that starts again.

    A sequence that starts again comes with the tokens that its output has so far.
    """

    seq: int
    epoch: int
    tokens: bytes  # encoded by `wire.tokens`
    num_prompt_tokens: int  # how many of `tokens` are the prompt
    blocks: Ids  # KV blocks whose tokens are computed already, from the prefix cache
    sampling: Sampling


class Work(Wire, frozen=True):
    """The tokens of one sequence to compute in a step: `count` tokens from position `start` on.

    The last `len(drafts)` of them are drafts. If `sample` is set, the rank draws a token after the last known token and
    after every draft. It keeps the drawn tokens up to and including the first that differs from its draft.
    """

    seq: int
    start: int
    count: int
    sample: bool
    blocks: Ids = ()  # KV blocks to append to the sequence's block table first
    drafts: Ids = ()
    masked: bool = False  # True: the StepMask of this step has a row for each token that may be drawn for it


class StepPlan(Wire, frozen=True):
    """The work of all ranks of a replica in one step.

    If any work is `masked`, the next message to the rank is the StepMask of this step.
    """

    incarnation: int
    step: int
    work: tuple[Work, ...]
    new: tuple[NewSeq, ...] = ()
    released: Ids = ()  # sequences to forget; they are forgotten before `new` is added
    lockstep: bool = False  # True: ranks of other replicas take part in the step, so it must run even without work

    @property
    def masked(self) -> bool:
        return any(work.masked for work in self.work)


class StepMask(Wire, frozen=True):
    """The tokens that may be drawn in a step whose plan is masked. It is made while the ranks compute the step.

    There is a row for each token that may be drawn for a masked work, in the order of the works.
    """

    incarnation: int
    step: int
    bits: bytes  # rows of 32-bit words, little endian; bit t % 32 of word t // 32 is 1 if token t is allowed
    words: int  # words in a row


class TokenLogprobs(Wire, frozen=True, gc=False):  # a long output has very many of them, and none is part of a cycle
    """The log-probability of one token of a text, and the likeliest tokens in its position."""

    chosen: float  # log-probability of the token itself
    rank: int  # its rank in the vocabulary; 1: the likeliest
    ids: Ids  # the likeliest tokens
    values: tuple[float, ...]  # their log-probabilities


class PromptLogprobs(Wire, frozen=True):
    """The log-probabilities of a prompt's tokens from position `start` on."""

    start: int
    entries: tuple[TokenLogprobs, ...]


class SeqOut(Wire, frozen=True):
    """The output of one step for one sequence."""

    seq: int
    epoch: int
    tokens: Ids  # the drawn tokens that were kept
    logprobs: tuple[TokenLogprobs, ...] = ()  # one for each of `tokens`, if they were asked for
    prompt_logprobs: PromptLogprobs | None = None
    drafts: Ids = ()  # what the draft model proposes for the tokens after them


class StepTimes(Wire, frozen=True):
    """The time that a rank of the last stage spent on a step, in microseconds.

    Time in which it waited for other ranks of its stage is included; time in which it waited for other stages is not.
    """

    total_us: int  # the whole step
    forward_us: int  # the forward pass


class StepResult(Wire, frozen=True):
    """The outcome of a step, from the first rank of the last stage."""

    incarnation: int
    step: int
    out: tuple[SeqOut, ...]
    times: StepTimes


class RankSetup(Wire, frozen=True):
    """The first message of an engine to a rank: the plan of its replica, and its own number in the plan.

    A rank that gets another setup, with a larger incarnation, is a survivor: a rank with which it exchanges tensors was
    replaced. It drops all messages before, forgets its sequences, keeps its weights, and connects to the others again.
    """

    wire_version: int
    incarnation: int
    rank: int
    plan: EnginePlan
    store: str = ""  # host:port of the store where ranks of several hosts find each other; "": all are on one host
    num_blocks: int = 0  # KV blocks that the ranks of the replica have agreed on before; 0: not yet

    @property
    def address(self) -> str:
        """The address of the rank's host, as the ranks of other hosts reach it."""
        nodes = self.plan.nodes
        return nodes[self.rank_plan.node].address if nodes else self.plan.place.address

    @property
    def rank_plan(self) -> RankPlan:
        """The plan of this rank."""
        return self.plan.ranks[self.rank]

    @property
    def world_size(self) -> int:
        """The number of ranks of the replica."""
        return len(self.plan.ranks)

    @property
    def global_rank(self) -> int:
        """The number of this rank among the ranks of all replicas."""
        return self.plan.layout.replica * self.world_size + self.rank


class RankCall(Wire, frozen=True):
    """A call of all ranks, in order with step plans: a start phase, or something that all ranks do together later."""

    id: int
    verb: str  # the name of the operation
    payload: bytes = b""


class RankReply(Wire, frozen=True):
    """The answer of a rank to a RankCall."""

    id: int
    rank: int
    payload: bytes


class Heartbeat(Wire, frozen=True):
    """A heartbeat of a rank."""

    rank: int
    step: int  # the last step that it has finished
    doing: str  # what it is doing now, for error messages
    still_s: float = 0.0  # seconds since it has begun or ended an operation; 0: it has no work
    waits: bool = False  # True: it is in an operation with other ranks, and may wait for one of them


class RankReport(Wire, frozen=True):
    """A report that a rank has failed. The rank takes no more work."""

    rank: int
    step: int  # the last step that it has finished
    error: str
    user_error: bool = False  # True: the user can correct it
    communication: bool = False  # True: it was waiting for other ranks, one of which may be the cause
    incarnation: int = 0  # the one of its last RankSetup


class Preparation(Wire, frozen=True):
    """The first message to a fork server: what it loads before it forks processes for ranks."""

    device: str
    dtype: str
    models: tuple[ModelPlan, ...]  # the model that a rank may have to load, and the draft model
    low_priority: bool = False  # True: ranks compute meanwhile, and keep most processor time


class TakeRank(Wire, frozen=True):
    """An order to a fork server to fork the process of a rank. The rank's end of its channel comes with it."""

    rank: int
    cores: Ids = ()  # those to which the process binds its threads; (): they are not bound


class Loading(Wire, frozen=True):
    """A sign of life of a fork server that is still loading."""


class ForkServerReady(Wire, frozen=True):
    """A note that a fork server has loaded everything."""

    memory: int  # bytes that it takes and that no file backs


class Forked(Wire, frozen=True):
    """The answer of a fork server to a TakeRank, in the order of these."""

    pid: int = 0  # 0: no process was forked
    error: str = ""  # why not


ToForkServer = Preparation | TakeRank

FromForkServer = Loading | ForkServerReady | Forked

ToRank = RankSetup | StepPlan | StepMask | RankCall | Stop

# A process first gets the credentials of its host.
ToRankProcess = Credentials | ToRank

FromRank = StepResult | RankReply | Heartbeat | RankReport


class LoadInfo(Wire, frozen=True):
    """The answer of a rank to `load`: what it holds and how it computes, for the log."""

    rank: int
    device: str
    first_layer: int
    layers: int  # number of layers
    q_heads: int  # number of query heads
    kv_heads: int
    experts: int  # number of experts in each layer that has experts
    weight_bytes: int
    threads: int
    kernels: str  # the name of the attention kernels
    linear: str  # how linear layers are computed
    comm: str  # how tensors travel to other ranks, for each axis of the mesh; "": there are no others
    weights_kept: bool = False  # True: it had its weights already, and has read none


class Capacity(Wire, frozen=True):
    """The answer of a rank to `profile`: how many KV blocks fit, and the size of one."""

    rank: int
    num_blocks: int
    block_bytes: int


class RankStats(Wire, frozen=True):
    """The memory of a rank in bytes, and the work that it has done since its start."""

    rank: int
    pid: int
    anonymous: int  # memory that no file backs; if ranks are threads, of the whole process
    anonymous_at_import: int  # the same, before the model was loaded
    kv_bytes: int  # the part of `anonymous` that is written pages of the KV cache
    weight_bytes: int
    stage: int = 0
    busy_us: int = 0  # microseconds in steps, including waits for ranks of the same stage in any replica
    traffic: tuple[Traffic, ...] = ()
    loads: int = 0  # how many times the rank has read its weights
    stage_wait_us: int = 0  # microseconds in steps in which it waited for other stages; `busy_us` has none of them


to_rank: msgspec.msgpack.Decoder[ToRankProcess] = msgspec.msgpack.Decoder(ToRankProcess)

from_rank: msgspec.msgpack.Decoder[FromRank] = msgspec.msgpack.Decoder(FromRank)

to_fork_server: msgspec.msgpack.Decoder[ToForkServer] = msgspec.msgpack.Decoder(ToForkServer)

from_fork_server: msgspec.msgpack.Decoder[FromForkServer] = msgspec.msgpack.Decoder(FromForkServer)

_load_info = msgspec.msgpack.Decoder(LoadInfo)

_capacity = msgspec.msgpack.Decoder(Capacity)

_rank_stats = msgspec.msgpack.Decoder(RankStats)


def decode_load_info(payload: bytes) -> LoadInfo:
    return _load_info.decode(payload)


def decode_capacity(payload: bytes) -> Capacity:
    return _capacity.decode(payload)


def decode_rank_stats(payload: bytes) -> RankStats:
    return _rank_stats.decode(payload)
