"""What is decided about one replica before anything starts, and what a process is told before it starts to work."""

from typing import Any, Literal

import msgspec

from shoal.config.engine_options import SpeculativeConfig
from shoal.wire.base import Ids, Wire

Span = tuple[int, int]  # a range of numbers: the first, and the one after the last


class ModelFiles(Wire, frozen=True):
    """The places of a model and its draft model, as absolute paths, and the state of their files when they were read.

    A text is empty where there is no draft model, or where nobody has looked yet.
    """

    folder: str
    draft_folder: str = ""
    state: str = ""
    draft_state: str = ""


class ReplicaPlace(Wire, frozen=True):
    """The place of a replica among those of its data-parallel group, and the way to the others."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the replicas on its host, which share its devices and memory
    local_size: int = 1  # replicas on its host; 0: the plan is for a front end without replicas of its own
    rendezvous: str = ""  # host:port at which replicas in lockstep, and their ranks, meet
    key: str = ""  # the shared secret that is asked for there
    address: str = "127.0.0.1"  # of this host, as others reach it
    meeting: int = 0  # the number of this meeting among those that the same processes have had there
    returning: bool = False  # it has been ready before: a replica that is missing has failed, no option is wrong


class Layout(Wire, frozen=True):
    """How the ranks of a replica share a model. Rank r is tensor-parallel rank r % tp of stage r // tp."""

    tp: int = 1
    tp_split: Ids = ()  # relative shares of the tensor-parallel ranks; (): equal ones
    stages: Ids = ()  # layers of each pipeline stage; (): all layers are in one
    experts: Literal["", "linear", "round_robin"] = ""  # how whole experts are placed on ranks; "": every expert is cut
    replica: int = 0  # the number of the replica that these ranks belong to
    replicas: int = 1

    @property
    def num_stages(self) -> int:
        return max(len(self.stages), 1)

    @property
    def num_ranks(self) -> int:
        """Ranks of one replica."""
        return self.tp * self.num_stages

    @property
    def shares_experts(self) -> bool:
        """True if the ranks of several replicas hold the experts together."""
        return bool(self.experts) and self.replicas > 1


class ShardPlan(Wire, frozen=True):
    """What one rank holds of one model. The fields are those of `models.manifest.Shard`, with spans for ranges."""

    tp_rank: int
    stage: int
    num_stages: int
    layers: Span
    q_heads: Span
    kv_heads: Span
    q_to_kv: Ids
    columns: dict[str, Span]  # the name of a `Cut` -> elements along a tensor's dimension
    experts: Ids | None
    vocab_sizes: Ids  # tokens of the vocabulary on each tensor-parallel rank of the stage


class ModelPlan(Wire, frozen=True):
    """One model of a replica: the one that is served, or its draft model."""

    folder: str
    implementation: Literal["shoal", "transformers"] = "shoal"
    overrides: str = "{}"  # JSON whose fields replace those of config.json
    file_state: str = ""  # of the model's files when the plan was made; "": not compared


class RankPlan(Wire, frozen=True):
    """One rank of a replica: where it runs, what it holds, and the memory it needs. Sizes are in bytes."""

    rank: int
    host: str
    device: Literal["cpu", "cuda"]
    device_index: int
    cores: Ids  # of a CPU, that it may use
    shard: ShardPlan
    draft_shard: ShardPlan | None
    weight_bytes: int
    activation_bytes: int
    context_token_bytes: int  # more, for each token of the longest context
    block_bytes: int  # of one KV block; 0: the rank has no KV heads
    kv_budget: int | None  # for the KV cache; None: the rank measures what its device has left
    cost_share: float  # of what one token costs in all ranks of the replica, an estimate


class Timeouts(Wire, frozen=True):
    """Deadlines in seconds."""

    start_s: float = 600.0  # of one phase of the start
    step_s: float = 300.0
    comm_s: float = 610.0  # of one operation between ranks


class EnginePlan(Wire, frozen=True):
    """Everything that is decided for one replica. Its engine and its ranks obey, and decide nothing again.

    Whoever leads makes it (`planner.planner`) and sends it to the engine as the first message. `reasons` and `warnings`
    are lines for the log.
    """

    name: str  # of the model, as the user gave it
    place: ReplicaPlace
    model: ModelPlan
    layout: Layout
    ranks: tuple[RankPlan, ...]
    executor: str  # the name of an executor (`executors.table`)
    dtype: str
    vocab_size: int
    max_model_len: int  # tokens of a prompt and its output
    asked_model_len: int  # what the user asked for; 0: as long as the model and the KV cache allow
    block_size: int
    prefix_caching: bool
    memory_utilization: float  # share of a GPU's memory that a rank may use, where it measures what is left
    max_num_seqs: int
    max_num_batched_tokens: int
    max_in_flight: int  # step plans that may be with the ranks at a time
    window: int | None  # tokens that any layer looks back; None: some layer sees everything
    prompt_logprobs: int  # tokens of prompts whose log-probabilities are computed in one step
    load_format: str
    seed: int  # of made-up weights
    timeouts: Timeouts
    bind_cores: bool = True  # threads of a rank keep to its cores
    all2all: str = ""  # how tokens reach the experts of other replicas' ranks; "": they need not
    draft: ModelPlan | None = None
    speculative: SpeculativeConfig | None = None
    eos: Ids = ()  # tokens that end a text
    tokenizer_folder: str = ""  # of the tokenizer that grammars are compiled for; "": the model's folder
    grammar_cores: Ids = ()  # cores of the host, for the processes that follow grammars
    agreement: dict[str, str] = msgspec.field(
        default_factory=dict
    )  # what must be the same in all processes of the job: name -> value or digest
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def num_blocks(self) -> int | None:
        """KV blocks that every rank has room for, but one without KV heads; None where ranks measure."""
        budgets = [(rank.kv_budget, rank.block_bytes) for rank in self.ranks if rank.block_bytes]
        return min((budget // block for budget, block in budgets if budget is not None), default=None)

    @property
    def num_drafts(self) -> int:
        """Tokens that a draft model guesses at a time; 0 without one."""
        return self.speculative.num_speculative_tokens if self.draft is not None and self.speculative else 0


class ServedModel(Wire, frozen=True):
    """What a front end must know of a model whose replicas are somebody else's affair."""

    folder: str
    tokenizer_folder: str  # of the tokenizer and its chat template; most often the model's folder
    file_state: str
    overrides: str  # JSON whose fields replace those of config.json
    vocab_size: int
    max_model_len: int
    cores: Ids  # for the processes that check grammars


class ApiSetup(Wire, frozen=True):
    """The first message to an API server process: the model and its options, and what `shoal serve` was told besides.

    `sockets` are the descriptors at which it accepts connections.
    """

    model: str | None
    options: dict[str, Any]
    settings: dict[str, Any]
    listening: dict[str, Any]
    served: ServedModel
    number: int = 0
    sockets: tuple[int, ...] = ()
