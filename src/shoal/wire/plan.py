"""The plan of a replica, and the first messages to the processes that obey it."""

from typing import Any, Literal

import msgspec

from shoal.config.option_forms import SpeculativeConfig
from shoal.wire.base import Ids, Wire, replace_fields
from shoal.wire.credentials import NO_CREDENTIALS, Credentials

Span = tuple[int, int]  # a range of numbers: the first, and the one after the last


class ModelFiles(Wire, frozen=True):
    """The folders of a model and its draft model, and the state of their files when they were read.

    A state tells whether files have changed since (`Checkpoint.state`). It is empty before they are read.
    """

    folder: str  # an absolute path
    draft_folder: str = ""  # an absolute path; "": there is no draft model
    state: str = ""
    draft_state: str = ""


class ReplicaPlace(Wire, frozen=True):
    """The place of a replica in its data-parallel group, and the address at which the group meets."""

    rank: int = 0  # the number of the replica in the group
    size: int = 1  # replicas in the group
    local_rank: int = 0  # its number among the replicas on its host, which share the host's devices and memory
    local_size: int = 1  # replicas on its host; 0: the plan is for a front end without replicas of its own
    rendezvous: str = ""  # host:port of the rendezvous where replicas in lockstep, and their ranks, meet
    credentials: Credentials = NO_CREDENTIALS  # those of this host, for the rendezvous; they stay on the host
    address: str = "127.0.0.1"  # the address of this host, as other hosts reach it
    ports: Span | None = None  # the first and the last port that may be opened for other hosts; None: any
    meeting: int = 0  # the number that the rendezvous gave to this meeting; each restart of the group is a new one
    returning: bool = False  # it was ready before, so a missing replica has failed; no option is to blame


class Layout(Wire, frozen=True):
    """The way in which ranks share a model. Rank r is tensor-parallel rank r % tp of stage r // tp."""

    tp: int = 1  # tensor-parallel ranks of each stage
    tp_split: Ids = ()  # relative shares of the tensor-parallel ranks; (): equal shares
    stages: Ids = ()  # number of layers of each pipeline stage; (): one stage has all layers
    experts: Literal["", "linear", "round_robin"] = ""  # how whole experts are placed on ranks; "": every expert is cut
    replica: int = 0  # the number of the replica that these ranks belong to
    replicas: int = 1  # replicas in the data-parallel group

    @property
    def num_stages(self) -> int:
        return max(len(self.stages), 1)

    @property
    def num_ranks(self) -> int:
        """The number of ranks of one replica."""
        return self.tp * self.num_stages

    @property
    def shares_experts(self) -> bool:
        """True if the ranks of several replicas hold the experts together."""
        return bool(self.experts) and self.replicas > 1


class ShardPlan(Wire, frozen=True):
    """The part of one model that one rank holds: a `models.manifest.Shard` as a message."""

    tp_rank: int
    stage: int  # the number of the rank's pipeline stage
    num_stages: int
    layers: Span
    q_heads: Span  # query heads
    kv_heads: Span
    q_to_kv: Ids  # for each query head of this rank, the index of its KV head among those of this rank
    columns: dict[str, Span]  # name of a `models.manifest.Cut` -> this rank's elements of a dimension with that cut
    experts: Ids | None  # the experts that it holds whole; None: it holds a part of every expert
    vocab_sizes: Ids  # for each tensor-parallel rank of the stage, how many tokens of the vocabulary it holds


class ModelPlan(Wire, frozen=True):
    """A model of a replica: the served model or its draft model."""

    folder: str
    implementation: Literal["shoal", "transformers"] = "shoal"
    overrides: str = "{}"  # a JSON object; its fields replace those of config.json
    file_state: str = ""  # state of the model's files when the plan was made; "": it is not compared
    quantization: str = ""  # the value of `--quantization`, or ""


class RankPlan(Wire, frozen=True):
    """A rank of a replica: where it runs, what it holds, and the memory that it needs in bytes."""

    rank: int
    host: str
    device: Literal["cpu", "cuda"]
    device_index: int
    cores: Ids  # the CPU cores that it may use
    shard: ShardPlan  # its part of the served model
    draft_shard: ShardPlan | None  # its part of the draft model
    weight_bytes: int
    activation_bytes: int  # the most that a step needs beside weights and KV cache, for a context of length 0
    context_token_bytes: int  # ... and in addition for each token of the longest context
    block_bytes: int  # size of one KV block; 0: the rank has no KV heads
    kv_budget: int | None  # size of the KV cache; None: the rank measures how much memory its device has left
    cost_share: float  # the estimated part of a token's cost that falls on this rank; over all ranks the sum is 1
    node: int = 0  # the number of its node in `EnginePlan.nodes`
    numa_node: int | None = None  # the NUMA node that has its cores, and whose memory it prefers; None: no single one


class NodePlan(Wire, frozen=True):
    """A node: one of the hosts of a replica that has several, with some of its ranks (`RankPlan.node`)."""

    number: int  # among the nodes of all replicas
    host: str
    address: str  # of the host, as the other hosts of the replica reach it
    files: ModelFiles  # where the models lie on this host
    here: bool  # it is the host of the engine, which starts the ranks of this node itself

    @property
    def name(self) -> str:
        return f"node {self.number} ({self.host}, {self.address})"


class Timeouts(Wire, frozen=True):
    """Deadlines in seconds."""

    start_s: float = 600.0  # for one phase of the start
    step_s: float = 300.0  # for a step
    comm_s: float = 610.0  # for one communication operation between ranks


class EnginePlan(Wire, frozen=True):
    """All decisions about one replica. Its engine and its ranks obey them, and decide none of this themselves.

    The process that leads makes the plan (`planner.planner`), also for replicas that other hosts start, and sends it to
    the engine as the first message.
    """

    name: str  # the model, as the user named it
    place: ReplicaPlace
    model: ModelPlan
    layout: Layout
    ranks: tuple[RankPlan, ...]
    executor: str  # the name of an executor (`executors.table`)
    dtype: str  # of weights and activations
    kv_dtype: str  # of the KV cache, a name in `models.kv_format`
    vocab_size: int
    max_model_len: int  # the most tokens that a prompt and its output may have together
    asked_model_len: int  # the user's --max-model-len; 0: not given, so the model and the KV cache set the limit
    block_size: int  # token positions in a KV block
    prefix_caching: bool
    memory_utilization: float  # the share of a GPU's memory that a rank may use, where it measures what is left
    max_num_seqs: int  # the most sequences in a step
    max_num_batched_tokens: int  # the most tokens in a step
    max_in_flight: int  # how many steps may be planned and not yet answered
    window: int | None  # the longest attention window of all layers, in tokens; None: some layer has no window
    prompt_logprobs: int  # for how many prompt tokens one step may compute log-probabilities
    load_format: str
    seed: int  # for made-up weights
    timeouts: Timeouts
    bind_cores: bool = True  # True: the threads of a rank run on its cores only
    all2all: str = ""  # backend that takes tokens to experts on ranks of other replicas; "": none is needed
    comm_backend: Literal["auto", "shm", "gloo", "nccl"] = "auto"  # as asked for; each group chooses as it connects
    record_steps: bool = True  # ranks record decoding steps where they can
    draft: ModelPlan | None = None
    speculative: SpeculativeConfig | None = None
    eos: Ids = ()  # tokens that end a text
    tokenizer_folder: str = ""  # folder of the tokenizer that grammars are compiled for; "": the model's folder
    grammar_cores: Ids = ()  # the CPU cores for the processes that follow grammars
    # Name -> value or digest of what must be the same in all processes of the job (`launch.agreement`).
    agreement: dict[str, str] = msgspec.field(default_factory=dict)
    nodes: tuple[NodePlan, ...] = ()  # the hosts of the replica; (): all ranks run on the host of the engine
    warm_spares: Ids = ()  # how many warm spares each host of the replica keeps (as in `nodes`); (): none
    reasons: tuple[str, ...] = ()  # lines for the log, which explain the decisions
    warnings: tuple[str, ...] = ()  # lines for the log

    @property
    def num_blocks(self) -> int | None:
        """The number of KV blocks that fit on every rank; None if ranks must measure it.

        Ranks without KV heads have room for any number.
        """
        budgets = [(rank.kv_budget, rank.block_bytes) for rank in self.ranks if rank.block_bytes]
        return min((budget // block for budget, block in budgets if budget is not None), default=None)

    @property
    def nodes_elsewhere(self) -> dict[int, NodePlan]:
        """The nodes that are not the host of the engine, by their numbers."""
        return {number: node for number, node in enumerate(self.nodes) if not node.here}

    def on_node(self, number: int) -> "EnginePlan":
        """Return the plan for the ranks of a node, with the folders that the models have on its host.

        A plan for another host has no credentials: that host has its own.
        """
        if not self.nodes:
            return self
        node = self.nodes[number]
        files = node.files
        place = self.place if node.here else replace_fields(self.place, credentials=NO_CREDENTIALS)
        model = replace_fields(self.model, folder=files.folder, file_state=files.state)
        draft = self.draft and replace_fields(self.draft, folder=files.draft_folder, file_state=files.draft_state)
        return replace_fields(self, place=place, model=model, draft=draft)

    def warm_spares_on(self, node: int) -> int:
        """Return how many warm spares a node keeps."""
        return self.warm_spares[node] if self.warm_spares else 0

    @property
    def num_drafts(self) -> int:
        """The number of tokens that the draft model proposes at a time; 0 without a draft model."""
        return self.speculative.num_speculative_tokens if self.draft is not None and self.speculative else 0


class ServedModel(Wire, frozen=True):
    """The facts about a model that a front end needs when another process runs its replicas."""

    folder: str
    tokenizer_folder: str  # folder of the tokenizer and its chat template; usually the model's folder
    file_state: str  # state of the model's files when the plan was made
    overrides: str  # a JSON object; its fields replace those of config.json
    vocab_size: int
    max_model_len: int
    cores: Ids  # the CPU cores for the processes that check grammars


class ApiSetup(Wire, frozen=True):
    """The first message to an API server process."""

    model: str | None  # the model, as the user named it
    options: dict[str, Any]  # the engine options that the user gave
    settings: dict[str, Any]  # the fields of `ServerSettings`
    listening: dict[str, Any]  # the fields of `Listening`
    served: ServedModel
    number: int = 0  # the number of this process among the API servers
    sockets: tuple[int, ...] = ()  # file descriptors of the listening sockets
