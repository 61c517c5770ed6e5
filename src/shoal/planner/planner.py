"""The planner of replicas on given hosts: it turns options, model and hardware into plans, with the reasons.

The process that leads makes all plans, once: with one planner per host if each replica is on one host, else with one
planner per replica. A planner starts nothing, and engines and ranks decide nothing that is in a plan.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

from shoal.config.engine_options import EngineOptions, Executor
from shoal.devices.hardware import Hardware
from shoal.devices.numa import node_of
from shoal.errors import ConfigError
from shoal.models.implementation import implementation_of, rank_shards
from shoal.models.manifest import ITEM_BYTES, Cut, Shard
from shoal.models.model_folder import OpenedModel
from shoal.models.spec import ModelSpec
from shoal.models.transformers.fallback_spec import FallbackSpec
from shoal.planner.all2all import plan_all2all
from shoal.planner.budgets import budgets_of_added_replica, kv_budgets, num_blocks
from shoal.planner.comm_backend import check_comm_backend
from shoal.planner.context_length import context_length
from shoal.planner.costs import cost_shares, draft_cost
from shoal.planner.host_devices import check_devices, describe_nodes, device_of, rank_cores, restrict_cores
from shoal.planner.host_links import Measured
from shoal.planner.kv_dtype import plan_kv_dtype
from shoal.planner.layout import plan_layout
from shoal.planner.measured_hosts import MeasuredHosts
from shoal.planner.memory import RankMemory, StepSize, rank_memory
from shoal.planner.model_reader import ModelReader
from shoal.planner.placement import ReplicaHost, place_ranks
from shoal.planner.quantization import check_quantization, describe_quantization
from shoal.planner.traffic_advice import describe_traffic
from shoal.planner.warm_spares import warm_spares
from shoal.wire.base import Ids, replace_fields
from shoal.wire.plan import EnginePlan, Layout, ModelPlan, NodePlan, RankPlan, ReplicaPlace, ShardPlan, Timeouts

_DTYPES = {"float": "float32", "half": "float16"}  # names that vLLM has for types -> ours
# A rank waits longer for other ranks than the executor waits for a step, because the executor's error says more.
_COMM_GRACE_S = 10.0
# The most logits of prompt tokens that one step computes for log-probabilities. Other requests wait for them, at this
# size for about a tenth of a second.
_PROMPT_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 30}


@dataclass(slots=True)
class _RankShares:
    """The parts of a model and its draft model on the ranks of one replica, and what these parts need.

    The draft model is on the last stage.
    """

    shards: tuple[Shard, ...]  # by rank
    draft_shards: tuple[Shard, ...]  # by tensor-parallel rank of the last stage; () without a draft model
    memories: tuple[RankMemory, ...]  # by rank
    costs: tuple[float, ...]  # by rank: its share of the cost of a token


class Planner:
    """The planner of all replicas on the same hosts, including those that are added later.

    `first_plan` is the plan of the first replica, `hosts` are those that share its ranks, and `measured` is what was
    measured on them and between them.
    """

    def __init__(
        self,
        reader: ModelReader,
        hosts: Sequence[ReplicaHost],
        place: ReplicaPlace,
        options: EngineOptions | None = None,
        measured: Measured | None = None,
        *,
        online: bool = False,
    ) -> None:
        """Plan the first replica.

        Args:
            reader: the models, as this process reads them.
            hosts: the hosts that share the ranks of each replica, before any replica is started there.
            place: the place of the first replica. If its `local_size` is 0, the plans are for a front end without
                replicas of its own: they need no devices and no memory, and have no size of a KV cache.
            options: those that count, except for what each host chooses for itself; None: those of the first host.
            measured: what was measured on these hosts and between them, and on others; None: nothing.
            online: True for servers.

        Raises:
            UserError: the models cannot be read, or options, models and hardware do not fit together.
        """
        first = hosts[0]
        self.options = options = options or first.options
        self.hardware = first.facts.hardware
        self._reader = reader
        self.measured = measured
        self._local_size = place.local_size
        self._online = online
        self._reasons: list[str] = []
        self._warnings: list[str] = []
        spec, draft_spec = reader.spec, reader.draft_spec
        if options.model_options.hf_overrides:
            replaced = ", ".join(options.model_options.hf_overrides)
            self._reasons.append(f"--hf-overrides replaces fields of config.json: {replaced}")
        self._layout = plan_layout(options, spec, draft_spec, place, self._reasons, self._warnings)
        if place.local_size:
            for host in hosts:
                self._reasons += host.facts.hardware.limits
        elif options.nodes.nnodes == 1 and options.parallel.distributed_executor_backend != "ray":
            self._reasons.append("no replica runs on this host: its memory and devices are not planned")
        found = MeasuredHosts(hosts, self._layout, self._reasons, self._warnings)
        if place.local_size:
            found.find(measured, spec, options)
        self._placed = place_ranks(
            hosts,
            tp=self._layout.tp,
            stages=self._layout.num_stages,
            wanted=options.nodes.placement,
            reasons=self._reasons,
            warnings=self._warnings,
            step=found.step,
        )
        self.hosts = [self._restricted(host, ranks) for host, ranks in zip(hosts, self._placed, strict=True)]
        if place.local_size and len(hosts) == 1:
            check_devices(options, place, self.hosts[0].facts.hardware, [], [])
        self._device_orders = found.order_devices(self.hosts, self._placed, place.local_size)
        self.hardware = self.hosts[0].facts.hardware
        self._executor = _executor(
            options, self._layout, self.hardware, self._reasons, hosts=max(len(hosts), options.nodes.nnodes)
        )
        check_quantization(options, self.hardware.device)
        check_comm_backend(options, self.hardware.device, self._executor, len(hosts), self._warnings)
        opened = reader.open()
        self.model, self.draft = opened.model, opened.draft
        self._reasons += self.model.notes
        self._reasons += [f"draft model: {note}" for note in self.draft.notes] if self.draft else []
        self._dtype = _dtype(options, self.model.spec, self._reasons)
        self._kv_dtype = plan_kv_dtype(options, self.model.spec, self._dtype, self._reasons)
        self._add_model_reasons()
        if len(hosts) > 1:
            describe_traffic(
                *(self.model.spec, self._dtype, self._layout.tp, self._layout.stages, self._placed),
                reasons=self._reasons,
                warnings=self._warnings,
                step=found.step,
            )
        self._all2all = plan_all2all(options, self.model.spec, self._layout, self._dtype, self._reasons)
        self.files = first.files or opened.files
        self.first_plan = self.plan(place)

    def for_hosts(
        self,
        hosts: Sequence[ReplicaHost],
        place: ReplicaPlace,
        options: EngineOptions | None = None,
        measured: Measured | None = None,
    ) -> "Planner":
        """Return a planner of replicas on other hosts, which have the same models (see `__init__`).

        Args:
            measured: None: what this planner has got.

        Raises:
            UserError: options, models and hardware do not fit together.
        """
        return Planner(self._reader, hosts, place, options, measured or self.measured, online=self._online)

    def _restricted(self, host: ReplicaHost, ranks: Ids) -> ReplicaHost:
        """Return the host with the cores that its options allow for `ranks` of each replica."""
        if not self._local_size:
            return host
        count = len(ranks) * self._local_size
        hardware = restrict_cores(host.options, count, host.facts.hardware, self._reasons)
        return dataclasses.replace(host, facts=replace_fields(host.facts, hardware=hardware))

    def plan(self, place: ReplicaPlace) -> EnginePlan:
        """Return the plan of the replica at this place.

        Raises:
            ConfigError: this host does not have enough memory or devices for it.
        """
        options, reasons, warnings = self.options, list(self._reasons), list(self._warnings)
        layout = replace_fields(self._layout, replica=place.rank, replicas=place.size)
        shares = self._share_models(layout)
        if place.local_size:
            if len(self.hosts) == 1:
                check_devices(options, place, self.hardware, reasons, warnings, self._device_orders[0])
            budgets = self._budgets(place, shares.memories, reasons)
        else:
            budgets = (None,) * layout.num_ranks
        blocks = num_blocks(shares.memories, budgets)
        model_len = context_length(options, self.model.spec, self._draft_spec, blocks, reasons)
        spares = warm_spares(
            *(self.hosts, self._placed, shares.memories, blocks, layout, place),
            executor=self._executor,
            online=self._online,
            reasons=reasons,
            warnings=warnings,
        )
        ranks = self._rank_plans(place, layout, shares, budgets)
        if place.local_size:
            reasons += describe_nodes(ranks, [host.facts for host in self.hosts])
        scheduler, parallel = options.scheduler, options.parallel
        return EnginePlan(
            name=options.model or "",
            place=place,
            model=_model_plan(self.files.folder, self.files.state, self.model, options),
            layout=layout,
            ranks=ranks,
            executor=self._executor,
            dtype=self._dtype,
            kv_dtype=self._kv_dtype,
            vocab_size=self.model.spec.vocab_size,
            max_model_len=model_len,
            asked_model_len=options.model_options.max_model_len or 0,
            block_size=options.cache.block_size,
            prefix_caching=options.cache.enable_prefix_caching,
            memory_utilization=options.cache.gpu_memory_utilization,
            max_num_seqs=scheduler.max_num_seqs,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
            max_in_flight=scheduler.max_in_flight or layout.num_stages + 1,
            window=self._window(),
            prompt_logprobs=max(_PROMPT_LOGITS[self.hardware.device] // self.model.spec.vocab_size, 1),
            load_format=options.model_options.load_format,
            seed=options.model_options.seed,
            timeouts=Timeouts(
                parallel.start_timeout,
                parallel.step_timeout,
                max(parallel.step_timeout, parallel.start_timeout) + _COMM_GRACE_S,
            ),
            bind_cores=parallel.cpu_cores != (),
            all2all=self._all2all,
            comm_backend=parallel.comm_backend,
            record_steps=not options.model_options.enforce_eager,
            draft=None
            if self.draft is None
            else _model_plan(self.files.draft_folder, self.files.draft_state, self.draft, options),
            speculative=options.model_options.speculative_config,
            grammar_cores=self.hardware.cores if self.hosts[0].here else (),
            nodes=self._nodes(),
            warm_spares=spares,
            reasons=tuple(reasons),
            warnings=tuple(warnings),
        )

    # --- the models ----------------------------------------------------------------------------------------------

    @property
    def _draft_spec(self) -> ModelSpec | None:
        return None if self.draft is None else self.draft.spec

    def _add_model_reasons(self) -> None:
        """Append to the reasons how transformers' modules are cut, and what each rank gets of an uneven split."""
        specs = [self.model.spec, self._draft_spec]
        self._reasons += [each.describe(self._layout.tp) for each in specs if isinstance(each, FallbackSpec)]
        if self._layout.tp_split:
            shares = ":".join(map(str, self._layout.tp_split))
            held = _describe_shards(rank_shards(self.model.spec, self._layout)[: self._layout.tp])
            self._reasons.append(f"shares {shares} of {self.model.spec.family}: {held}")
        if self.options.model_options.quantization:
            shards = rank_shards(self.model.spec, self._layout)
            wanted = self.options.model_options.quantization
            self._reasons.append(describe_quantization(wanted, self.model.params, shards, self._dtype))

    def _window(self) -> int | None:
        """Return the longest attention window over the layers of both models; None if some layer has no window."""
        specs = [self.model.spec] if self.draft is None else [self.model.spec, self.draft.spec]
        windows = [attention.window for spec in specs for attention in spec.attention]
        return None if None in windows else max(window for window in windows if window is not None)

    # --- the ranks -----------------------------------------------------------------------------------------------

    def _share_models(self, layout: Layout) -> _RankShares:
        """Return what each rank holds, needs and computes.

        The draft model runs on the last stage, because the ranks there know the drawn tokens first.
        """
        options, model, draft = self.options, self.model, self.draft
        shards = rank_shards(model.spec, layout)
        together = layout.replicas if layout.shares_experts else 1
        memories = self._memories(model, shards, _step_size(options), together)
        speculative = options.model_options.speculative_config
        if draft is None or speculative is None:
            return _RankShares(shards, (), memories, cost_shares(model.spec, model.params, shards, replicas=together))
        drafting = rank_shards(draft.spec, Layout(layout.tp, layout.tp_split))
        draft_step = StepSize(options.scheduler.max_num_batched_tokens, options.scheduler.max_num_seqs)
        drafts = self._memories(draft, drafting, draft_step)
        last = [rank.with_draft(other) for rank, other in zip(memories[-layout.tp :], drafts, strict=True)]
        costs = [draft_cost(draft.spec, draft.params, speculative.num_speculative_tokens, shard) for shard in drafting]
        shares = cost_shares(model.spec, model.params, shards, replicas=together, draft=costs)
        return _RankShares(shards, drafting, (*memories[: -layout.tp], *last), shares)

    def _memories(
        self, model: OpenedModel, shards: Sequence[Shard], step: StepSize, replicas: int = 1
    ) -> tuple[RankMemory, ...]:
        return tuple(
            rank_memory(
                model.spec,
                model.params,
                shard,
                dtype=self._dtype,
                device=self.hardware.device,
                block_size=self.options.cache.block_size,
                step=step,
                kv_dtype=self._kv_dtype,
                replicas=replicas,
            )
            for shard in shards
        )

    def _budgets(
        self, place: ReplicaPlace, memories: Sequence[RankMemory], reasons: list[str]
    ) -> tuple[int | None, ...]:
        """Return the size of each rank's KV cache in bytes; None for ranks that measure it."""
        if place.local_rank >= self._local_size:
            found = budgets_of_added_replica(
                self.options, self.hosts[0].facts, memories, planned=self._local_size, replicas=place.local_rank + 1
            )
            if found is not None:
                return found
        budgets: dict[int, int | None] = {}
        for host, ranks in zip(self.hosts, self._placed, strict=True):
            needs = {rank: memories[rank] for rank in ranks}
            found = kv_budgets(host.options, host.facts, needs, reasons, replicas=place.local_size)
            budgets |= dict(zip(ranks, found, strict=True))
        return tuple(budgets[rank] for rank in range(len(memories)))

    def _nodes(self) -> tuple[NodePlan, ...]:
        """Return the hosts of each replica; none if there is only the host of the engine."""
        if len(self.hosts) == 1 and self.hosts[0].here:
            return ()
        return tuple(
            NodePlan(host.number, host.facts.name, host.address, host.files or self.files, host.here)
            for host in self.hosts
        )

    def _rank_plans(
        self, place: ReplicaPlace, layout: Layout, shares: _RankShares, budgets: Sequence[int | None]
    ) -> tuple[RankPlan, ...]:
        ends = layout.num_ranks - layout.tp
        plans = _shard_plans(shares.shards, layout.tp)
        drafts: list[ShardPlan | None] = [None] * ends
        drafts += _shard_plans(shares.draft_shards, layout.tp) or [None] * layout.tp
        bound = self.options.parallel.cpu_cores != ()  # otherwise their threads run on any core
        host_of, index_of, cores_of, memory_of = {}, {}, {}, {}
        for number, (host, ranks) in enumerate(zip(self.hosts, self._placed, strict=True)):
            cores = rank_cores(host.options, host.facts.hardware, place, len(ranks))
            for position, rank in enumerate(ranks):
                host_of[rank], cores_of[rank] = number, cores[position]
                memory_of[rank] = node_of(cores[position], host.facts.hardware.nodes) if bound else None
                index_of[rank] = device_of(self._device_orders[number], place.local_rank * len(ranks) + position)
        return tuple(
            RankPlan(
                rank=rank,
                host=self.hosts[host_of[rank]].facts.name,
                device=self.hardware.device,
                device_index=index_of[rank],
                cores=cores_of[rank],
                shard=plans[rank],
                draft_shard=drafts[rank],
                weight_bytes=memory.weights,
                activation_bytes=memory.activations,
                context_token_bytes=memory.context_token,
                block_bytes=memory.block,
                kv_budget=budgets[rank],
                cost_share=shares.costs[rank],
                node=host_of[rank],
                numa_node=memory_of[rank],
            )
            for rank, memory in enumerate(shares.memories)
        )


def _model_plan(folder: str, state: str, model: OpenedModel, options: EngineOptions) -> ModelPlan:
    overrides = json.dumps(dict(model.overrides))
    quantization = options.model_options.quantization or ""
    return ModelPlan(folder, implementation_of(model.spec), overrides, state, quantization)


def _shard_plans(shards: Sequence[Shard], tp: int) -> list[ShardPlan]:
    sizes = tuple(len(shard.ranges[Cut.VOCAB]) for shard in shards[:tp])
    return [shard.plan(sizes) for shard in shards]


def _step_size(options: EngineOptions) -> StepSize:
    """Return the size of the largest step. With drafts, a token is drawn after each draft too."""
    scheduler, speculative = options.scheduler, options.model_options.speculative_config
    draws = 1 if speculative is None else 1 + speculative.num_speculative_tokens  # of a sequence in a step
    tokens = scheduler.max_num_batched_tokens
    return StepSize(tokens, min(scheduler.max_num_seqs * draws, tokens))


def _describe_shards(shards: Sequence[Shard]) -> str:
    """Return what each rank holds, in the form `6, 3, 3 query heads; ...`."""
    counts = {
        "query heads": [len(shard.heads.q_range) for shard in shards],
        "KV heads": [len(shard.heads.kv_ids) for shard in shards],
        "MLP columns": [len(shard.ranges[Cut.MLP]) for shard in shards],
        "tokens of the vocabulary": [len(shard.ranges[Cut.VOCAB]) for shard in shards],
    }
    return "; ".join(f"{', '.join(map(str, each))} {what}" for what, each in counts.items())


def _dtype(options: EngineOptions, spec: ModelSpec, reasons: list[str]) -> str:
    wanted = options.model_options.dtype
    dtype = spec.dtype if wanted == "auto" else _DTYPES.get(wanted, wanted)
    if dtype not in ITEM_BYTES:
        raise ConfigError(f"the checkpoint's dtype {dtype} is not supported; choose --dtype {', '.join(ITEM_BYTES)}")
    reasons.append(f"dtype {dtype}: " + ("the checkpoint's" if wanted == "auto" else "as --dtype asks"))
    return dtype


def _executor(
    options: EngineOptions, layout: Layout, hardware: Hardware, reasons: list[str], *, hosts: int
) -> Executor:
    wanted, ranks = options.parallel.distributed_executor_backend, layout.num_ranks
    if hosts > 1 and wanted not in ("auto", "mp", "ray"):
        raise ConfigError(
            f"--distributed-executor-backend {wanted} runs all ranks of a replica on one host, but there are {hosts}: "
            "use mp, or leave it out"
        )
    together = ranks * layout.replicas if layout.shares_experts else ranks  # ranks that exchange tensors
    if wanted == "uni" and max(together, options.parallel.data_parallel_size) > 1:
        count = max(together, ranks * options.parallel.data_parallel_size)
        raise ConfigError(f"--distributed-executor-backend uni runs one rank, not {count}: use mp or threads")
    if wanted == "threads" and together > 1 and hardware.device == "cuda":
        raise ConfigError(f"--distributed-executor-backend threads can't move tensors between {together} GPUs: use mp")
    if wanted == "external_launcher":
        raise ConfigError("--distributed-executor-backend external_launcher: torchrun has not started this process")
    if wanted != "auto":
        return wanted
    chosen: Executor = "uni" if together == 1 else "mp"
    reasons.append(f"executor {chosen}: {ranks} rank{'s' if ranks > 1 else ''}")
    return chosen
