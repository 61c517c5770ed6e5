"""A model that was found, read and planned, before anything is started."""

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any

from shoal import env
from shoal.addresses import join_host_port, refuse_loopback_name
from shoal.config import vllm_options
from shoal.config.engine_options import EngineOptions, refuse_online
from shoal.errors import ConfigError
from shoal.launch import hub
from shoal.launch.agreement import host_agreement, replica_agreement
from shoal.launch.credentials import credentials_of_host
from shoal.launch.deployment import Deployment, NodeGroup
from shoal.launch.measured_links import expected_hosts, read_measured
from shoal.launch.ray.choice import choose_executor
from shoal.launch.torchrun import EXTERNAL_LAUNCHER, TorchrunJob
from shoal.log import get_logger
from shoal.models.checkpoint.checkpoint import check_files
from shoal.params import SamplingParams
from shoal.planner.host_devices import describe_host
from shoal.planner.host_links import Measured
from shoal.planner.model_reader import ModelReader
from shoal.planner.placement import ReplicaHost
from shoal.planner.planner import Planner
from shoal.process import open_files
from shoal.text.chat_template import ChatTemplate
from shoal.text.generation_config import GenerationDefaults
from shoal.text.grammar_checker import GrammarChecker
from shoal.text.grammar_host import grammar_pool
from shoal.text.prompts import PromptReader
from shoal.text.tokenizer import Tokenizer, open_other_tokenizer, open_tokenizer
from shoal.trace.target import TraceTarget
from shoal.values import shown
from shoal.wire.base import replace_fields
from shoal.wire.hosts import HostReport
from shoal.wire.plan import EnginePlan, ModelFiles, ReplicaPlace, ServedModel

log = get_logger("model")

_LEAST_SHARE = 0.9  # a tokenizer with a smaller share of the model's vocabulary is likely to be the wrong one


@dataclass(frozen=True, slots=True)
class OpenModel:
    """The model of a front end, and the planner of its replicas if this process starts them."""

    options: EngineOptions
    given: Mapping[str, Any]  # the options that the user gave
    served: ServedModel
    tokenizer: Tokenizer | None
    generation: GenerationDefaults
    planner: Planner | None  # None: another process plans and starts the replicas
    own_process: bool = False  # this process has no other purpose, so it may be bound to cores
    online: bool = False  # for a server
    manual_place: ReplicaPlace | None = None  # the place of this process, if the user starts each replica in a process
    job: TorchrunJob | None = None  # the processes that torchrun has started, if this is one of them

    @property
    def name(self) -> str:
        """The name that the user gave to the model, or the name of the bundled model."""
        return self.options.model or hub.BUNDLED_NAME

    @property
    def plan(self) -> EnginePlan:
        """The plan of the first replica."""
        return self._completed(self._own_planner.first_plan)

    def plan_at(self, place: ReplicaPlace) -> EnginePlan:
        """Return the plan of the replica at a place of this host. If it will meet others, it has the agreement.

        Raises:
            ConfigError: this host does not have enough memory or devices for it.
        """
        plan = self._completed(self._own_planner.plan(place))
        return replace_fields(plan, agreement=replica_agreement(self.agreement, plan)) if place.rendezvous else plan

    def plan_elsewhere(self, number: int, size: int, report: HostReport) -> EnginePlan:
        """Return the plan of a replica of another host, from the report of that host.

        Args:
            number: the number of the replica.
            size: the number of all replicas.

        Raises:
            UserError: that host does not have enough memory or devices for it, or its options contradict each other.
        """
        place = ReplicaPlace(number, size, local_rank=report.local_rank, local_size=report.local_size)
        planner = self._own_planner.for_hosts([self._reported_host(report)], place)
        plan = self._completed(planner.first_plan, report.tokenizer_folder)
        return replace_fields(plan, agreement=replica_agreement(self.agreement, plan))

    def plan_over(
        self,
        place: ReplicaPlace,
        nodes: Mapping[int, tuple[str, HostReport | None]],
        measured: Measured | None = None,
    ) -> EnginePlan:
        """Return the plan of a replica over several hosts.

        Args:
            place: where its engine runs.
            nodes: for each node, by its number, its address and its report; the report of this host is None.
            measured: what was measured between them; None: what --topology says.

        Raises:
            UserError: the hosts do not have enough memory or devices for it, or differ in the kind of their devices.
        """
        own = self._own_planner.hosts[0]
        hosts = [
            dataclasses.replace(own, address=address, files=self._own_planner.files, number=number)
            if report is None
            else dataclasses.replace(self._reported_host(report), address=address, here=False, number=number)
            for number, (address, report) in nodes.items()
        ]
        planner = self._own_planner.for_hosts(hosts, place, self.options, measured)
        plan = self._completed(planner.first_plan)
        return replace_fields(plan, agreement=replica_agreement(self.agreement, plan)) if place.rendezvous else plan

    def plan_over_equal_hosts(self) -> EnginePlan:
        """Return the plan of the first replica, if all nodes had the same devices and memory as this host.

        With --topology they have the names, addresses and links of the hosts in that file.

        Raises:
            UserError: the hosts would not have enough memory or devices for it; or the file has too few hosts.
        """
        own, parallel = self._own_planner.hosts[0], self.options.parallel
        count = max(self.options.nodes.nnodes // parallel.data_parallel_size, 1)
        places = expected_hosts(self._own_planner.measured, count, own.facts.name)
        hosts = [
            dataclasses.replace(
                own,
                facts=replace_fields(own.facts, name=place.name),
                address=place.address,
                number=number,
                here=number == 0,
            )
            for number, place in enumerate(places)
        ]
        place = ReplicaPlace(size=parallel.data_parallel_size)
        return self._completed(self._own_planner.for_hosts(hosts, place, self.options).first_plan)

    def _reported_host(self, report: HostReport) -> ReplicaHost:
        options = EngineOptions.from_flat(self.options.model, report.options)
        return ReplicaHost(options, report.facts, report.files)

    def _completed(self, plan: EnginePlan, tokenizer_folder: str = "") -> EnginePlan:
        """Return the plan with what the planner does not read: names and texts."""
        folder = tokenizer_folder or self.served.tokenizer_folder
        return replace_fields(plan, name=self.name, eos=self.generation.eos, tokenizer_folder=folder)

    @property
    def agreement(self) -> dict[str, str]:
        """The versions, options and digests that all hosts must have in common (see `launch.agreement`)."""
        return host_agreement(self.options, self._own_planner.files, self.served.tokenizer_folder)

    @property
    def num_replicas(self) -> int:
        """The number of replicas on all hosts, as the options say."""
        return self.options.parallel.data_parallel_size

    @property
    def node_group(self) -> NodeGroup | None:
        """The hosts over which each replica is spread by hand or by torchrun; None: there are none."""
        return NodeGroup.of(self.options, None if self.job is None else self.job.key)

    @property
    def has_nodes(self) -> bool:
        """True if the ranks of each replica are spread over nodes, which are not known before they have come."""
        return self.options.nodes.nnodes > 1 or self.options.parallel.distributed_executor_backend == "ray"

    def log_plan(self) -> None:
        """Log the reasons and warnings of the plan. Over several nodes, the leader does so when they have come."""
        if not self.has_nodes:
            log_plan(self._own_planner.first_plan)

    @property
    def _own_planner(self) -> Planner:
        assert self.planner is not None, "this process starts no replicas"
        return self.planner

    @property
    def vocab_size(self) -> int:
        return self.served.vocab_size

    def reader(self, max_model_len: int | None = None) -> PromptReader:
        """Return a reader that checks prompts and makes them into tokens.

        Args:
            max_model_len: the limit of the engine; None before it has started: the planned limit.
        """
        folder = Path(self.served.tokenizer_folder)
        return PromptReader(
            self.tokenizer,
            vocab_size=self.vocab_size,
            max_model_len=max_model_len or self.served.max_model_len,
            eos=self.generation.eos,
            chat_template=cache(lambda: ChatTemplate.open(folder)),
        )

    def grammar_checker(self) -> GrammarChecker:
        """Return a checker of the grammars of structured outputs. It starts its process with the first grammar."""
        served, eos = self.served, self.generation.eos
        folder = Path(served.tokenizer_folder)
        return GrammarChecker(lambda: grammar_pool(folder, eos, served.vocab_size, served.cores))

    def default_sampling_params(self, base: SamplingParams | None = None) -> SamplingParams:
        """Return `base` with the sampling defaults of the model's generation_config.json.

        With --generation-config vllm the file is ignored.
        """
        return self.generation.defaults(base)


def log_plan(plan: EnginePlan) -> None:
    """Log the reasons and warnings of a plan."""
    for reason in plan.reasons:
        log.info("%s", reason)
    for warning in plan.warnings:
        log.warning("%s", warning)


def trace_target(options: EngineOptions, manual_place: ReplicaPlace | None) -> TraceTarget:
    """Return where this process writes traces. A replica that was started by hand has files of its own."""
    return TraceTarget.of(options.tracing.trace, None if manual_place is None else manual_place.rank)


def name_of(model: object) -> str | None:
    """Return the name of a model, from a value that a user gave for it.

    Raises:
        ConfigError: it is neither a text nor a path nor None.
    """
    name = os.fspath(model) if isinstance(model, PathLike) else model
    if name is not None and not isinstance(name, str):
        raise ConfigError(f"model must be a folder, an id on the Hugging Face hub or None, got {shown(model)}")
    return name


def open_model(
    model: str | None,
    given: Mapping[str, Any],
    *,
    own_process: bool = False,
    online: bool = False,
    files: ModelFiles | None = None,
) -> OpenModel:
    """Find a model, read it, and plan its replicas on this host.

    Args:
        model: a folder, an id on the Hugging Face hub, a shape, or None for the bundled model.
        given: the options that the user gave.
        own_process: True if this process has no other purpose, so that it may be bound to cores.
        online: True for servers. Otherwise, options that have a meaning only for servers are refused.
        files: the folder of the model and the state of its files, if it was found before; None: find it.

    Raises:
        UserError: model, options and host do not fit together; the message says why, and what to do.
    """
    options, given = read_options(model, given, online=online, program=not (online or own_process))
    job = None
    if options.parallel.distributed_executor_backend == EXTERNAL_LAUNCHER:
        job = TorchrunJob.join(options)
        given = {**given, **job.options()}
        options = EngineOptions.from_flat(model, given)
    options = choose_executor(options)
    if online:
        refuse_manual_place(options)
    manual_place = _read_manual_place(options)
    leads = not options.nodes.node_rank and (job is None or not job.place.rank)
    if options.tracing.trace is not None and leads:
        trace_target(options, manual_place).check()
    place = manual_place or Deployment.of(options, None if job is None else job.key).place
    planner = plan_host(options, place, files, online=online)
    plan = planner.first_plan
    served = ServedModel(
        folder=plan.model.folder,
        tokenizer_folder=str(locate_tokenizer(options, Path(plan.model.folder))),
        file_state=plan.model.file_state,
        overrides=plan.model.overrides,
        vocab_size=plan.vocab_size,
        max_model_len=plan.max_model_len,
        cores=plan.grammar_cores,
    )
    found = _open_served(options, given, served)
    _warn_of_small_tokenizer(found)
    return dataclasses.replace(
        found, planner=planner, own_process=own_process, online=online, manual_place=manual_place, job=job
    )


def open_served_model(model: str | None, given: Mapping[str, Any], served: ServedModel) -> OpenModel:
    """Open a model for a front end whose replicas another process has planned and started.

    Raises:
        UserError: the model is missing, or its files have changed since it was planned.
    """
    options, given = read_options(model, given, online=True)
    if served.file_state:
        check_files(Path(served.folder), served.file_state)
    return _open_served(options, given, served)


def read_options(
    model: str | None, given: Mapping[str, Any], *, online: bool, program: bool = False
) -> tuple[EngineOptions, Mapping[str, Any]]:
    """Return the options, and those of them that the user gave, in Shoal's own names and forms.

    Args:
        program: this is a program of the user's, which torchrun may have started.

    Raises:
        ConfigError: an option is unknown, or has an impossible value; or options contradict each other.
    """
    open_files.fill_standard_descriptors()  # before anything opens a socket, which would get one of these descriptors
    if hub.is_shape(model):
        given = {"load_format": "dummy", **given}
    given = {name: os.fspath(each) if isinstance(each, PathLike) else each for name, each in given.items()}
    given, notes = vllm_options.take(given, server=online)
    options = EngineOptions.from_flat(model, given)
    for note in notes:
        log.info("%s", note)
    if not online:
        refuse_online(given)
    if options.parallel.distributed_executor_backend == EXTERNAL_LAUNCHER and not program:
        raise ConfigError(
            f"--distributed-executor-backend {EXTERNAL_LAUNCHER} is for programs with LLM(...) that torchrun starts, "
            "not for commands and servers: over several hosts, use --nnodes, --node-rank and --master-addr"
        )
    return options, given


def _open_served(options: EngineOptions, given: Mapping[str, Any], served: ServedModel) -> OpenModel:
    folder = Path(served.folder)
    generation = GenerationDefaults.open(
        folder,
        sampling=options.model_options.generation_config != "vllm",
        overrides=json.loads(served.overrides),
    )
    if served.tokenizer_folder == served.folder:
        tokenizer = open_tokenizer(folder)
    else:
        tokenizer = open_other_tokenizer(Path(served.tokenizer_folder), served.vocab_size)
    return OpenModel(options, given, served, tokenizer, generation, planner=None)


def refuse_manual_place(options: EngineOptions) -> None:
    """Check that the variables SHOAL_DP_* are not set, for a server.

    Raises:
        ConfigError: they are set.
    """
    place = _read_manual_place(options)
    if place is not None:
        raise ConfigError(
            f"SHOAL_DP_RANK={place.rank} is for programs of which each is one replica: to serve one replica, "
            f"use --data-parallel-size {place.size} --data-parallel-rank {place.rank}, and unset the variable"
        )


def _read_manual_place(options: EngineOptions) -> ReplicaPlace | None:
    """Return the place that the variables SHOAL_DP_* describe; None if they are not set or name one replica only."""
    found = env.data_parallel()
    asked = options.parallel.data_parallel_size
    if found is None or found.size == 1:
        return None
    if asked not in (1, found.size):
        raise ConfigError(
            f"--data-parallel-size is {asked}, but SHOAL_DP_SIZE is {found.size}: leave one of them out; with the "
            "variables set, each replica is a process that you start"
        )
    if found.size_local < found.size:
        refuse_loopback_name(found.master_ip, "SHOAL_DP_MASTER_IP")
    if found.local_assumed:
        log.warning(
            "rank %d assumes that no other rank runs on this host: set SHOAL_DP_RANK_LOCAL and SHOAL_DP_SIZE_LOCAL if "
            "several ranks share it",
            found.rank,
        )
    return ReplicaPlace(
        found.rank,
        found.size,
        local_rank=found.rank_local,
        local_size=found.size_local,
        rendezvous=join_host_port(found.master_ip, found.master_port),
        credentials=credentials_of_host(options.tls),
    )


def plan_host(
    options: EngineOptions, place: ReplicaPlace, files: ModelFiles | None = None, *, online: bool = False
) -> Planner:
    """Plan the replicas of this host. All mistakes that can be found before a process is started are found here.

    Args:
        place: the place of the first replica on this host.
        files: the folders of the models and the state of their files, if they were found before; None: find them.
        online: True for servers.

    Raises:
        UserError: model, options and host do not fit together.
    """
    measured = read_measured(options)
    reader = ModelReader(options.model_options, files or locate_files(options))
    has_ranks = place.local_size > 0 or options.nodes.nnodes > 1
    hosts = [ReplicaHost(options, describe_host(options, has_replicas=has_ranks))]
    return Planner(reader, hosts, place, measured=measured, online=online)


def locate_files(options: EngineOptions) -> ModelFiles:
    """Find the folders of the model and its draft model, and download them if necessary.

    Raises:
        UserError: a model cannot be found (see `hub.locate`).
    """
    weights = options.model_options.load_format != "dummy"
    folder = hub.locate(options.model, options.model_options.revision, weights=weights)
    speculative = options.model_options.speculative_config
    if speculative is None or speculative.method != "draft_model":
        return ModelFiles(str(folder))
    return ModelFiles(str(folder), str(hub.locate(speculative.model, speculative.revision, weights=weights)))


def _warn_of_small_tokenizer(model: OpenModel) -> None:
    """Warn if a tokenizer that is not the model's own has far fewer tokens than the model."""
    served, tokenizer = model.served, model.tokenizer
    if served.tokenizer_folder == served.folder or tokenizer is None:
        return
    if tokenizer.size < _LEAST_SHARE * served.vocab_size:
        log.warning(
            "--tokenizer: %s has %d tokens, the model has %d: is it the tokenizer that the model was trained with?",
            *(served.tokenizer_folder, tokenizer.size, served.vocab_size),
        )


def locate_tokenizer(options: EngineOptions, folder: Path) -> Path:
    """Return the folder of the tokenizer: the model's `folder`, unless the options name another one.

    Raises:
        UserError: it cannot be found (see `hub.locate`).
    """
    given = options.model_options
    if given.tokenizer is None and given.tokenizer_revision is None:
        return folder
    return hub.locate(given.tokenizer or options.model, given.tokenizer_revision, weights=False)
