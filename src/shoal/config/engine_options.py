"""The options of an engine. Each is written once, here; flags, `LLM(...)`, variables and docs derive from it.

None means that the planner decides; it logs what and why.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from shoal import env
from shoal.config import vllm_options
from shoal.config.option import Option, nearest, option
from shoal.config.option_forms import (
    Cores,
    Placement,
    Quantization,
    SpeculativeConfig,
    parse_cores,
    parse_overrides,
    parse_partition,
    parse_placement,
    parse_ports,
    parse_quantization,
    parse_resources,
    parse_speculative,
    parse_split,
)
from shoal.errors import ConfigError
from shoal.values import closest

Dtype = Literal["auto", "float32", "bfloat16", "float16", "float", "half"]
KVCacheDtype = Literal[
    "auto", "float32", "bfloat16", "float16", "int8", "int8_per_token_head", "fp8", "fp8_e4m3", "fp8_e5m2"
]
LoadFormat = Literal["auto", "dummy"]
Device = Literal["auto", "cpu", "cuda"]
Executor = Literal["uni", "threads", "mp", "ray"]
Backend = Literal["auto", Executor, "external_launcher"]
DataParallelBackend = Literal["mp", "ray"]
ExpertPlacement = Literal["linear", "round_robin"]
All2All = Literal["auto", "allgather_reducescatter", "all_to_all"]
CommBackend = Literal["auto", "shm", "gloo", "nccl"]
SchedulingPolicy = Literal["priority", "fcfs"]
ModelImpl = Literal["auto", "shoal", "transformers"]
GenerationConfig = Literal["auto", "vllm"]


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Model"""

    revision: str | None = option(None, "branch, tag or commit of a model on the hub")
    tokenizer: str | None = option(
        None, "folder or id on the hub whose tokenizer and chat template are used instead of the model's", local=True
    )
    tokenizer_revision: str | None = option(None, "branch, tag or commit of the tokenizer on the hub", local=True)
    dtype: Dtype = option(
        "auto", "type of weights and activations; auto: that of the checkpoint; float and half are float32 and float16"
    )
    quantization: Quantization | None = option(
        None,
        "keep the weights of linear layers in 8 or 4 bits, made while any checkpoint is loaded; on CPUs. int4 has a "
        "scale for each 128 inputs, int4-g32 for each 32, which is more exact and slower",
        parse=parse_quantization,
        metavar="int8|int4|int4-g32|int4-g64|int4-g128",
        short="-q",
    )
    max_model_len: int | None = option(
        None,
        "the most tokens of a prompt and its output together; auto: the model's limit, if memory allows",
        minimum=1,
    )
    hf_overrides: Mapping[str, Any] | None = option(
        None,
        'fields that replace those of config.json: {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}',
        parse=parse_overrides,
        metavar="JSON",
    )
    load_format: LoadFormat = option(
        "auto", "auto: the weights of the checkpoint; dummy: random weights, for benchmarks"
    )
    model_impl: ModelImpl = option(
        "auto",
        "shoal: Shoal's own; transformers: that library's, with Shoal's attention; auto: shoal if it knows the model",
    )
    generation_config: GenerationConfig = option(
        "auto", "auto: default sampling parameters from the model's generation_config.json; vllm: do not use that file"
    )
    speculative_config: SpeculativeConfig | None = option(
        None,
        'drafts that the model checks: {"method": "ngram", "num_speculative_tokens": 5} or {"model": DRAFT, ...}',
        parse=parse_speculative,
        metavar="JSON",
    )
    seed: int = option(0, "seed of requests that have none of their own", minimum=0)
    enforce_eager: bool = option(False, "launch the operations of a step one by one, and record no decoding steps")


@dataclass(frozen=True, slots=True)
class ParallelOptions:
    """Parallelism"""

    tensor_parallel_size: int = option(1, "ranks that share each layer", short="-tp", minimum=1)
    tensor_parallel_split: tuple[int, ...] | None = option(
        None,
        "relative shares of the ranks, one for each, where devices are unequal",
        parse=parse_split,
        metavar="2,1,...",
    )
    pipeline_parallel_size: int = option(1, "pipeline stages, each with some of the layers", short="-pp", minimum=1)
    pipeline_layer_partition: tuple[int, ...] | None = option(
        None,
        "number of layers of each stage; together all layers of the model; auto: stages of about equal cost",
        parse=parse_partition,
        metavar="N,N,...",
    )
    data_parallel_size: int = option(1, "replicas of the model, each with its own ranks", short="-dp", minimum=1)
    enable_expert_parallel: bool = option(
        False,
        "put whole experts on the ranks of a stage, over all replicas; otherwise each expert is split over ranks",
        short="-ep",
    )
    expert_placement_strategy: ExpertPlacement = option(
        "linear", "linear: neighbouring experts on the same rank; round_robin: on different ranks"
    )
    all2all_backend: All2All = option(
        "auto", "how tokens reach the ranks of their experts; auto: all_to_all if it sends a quarter fewer bytes"
    )
    comm_backend: CommBackend = option(
        "auto",
        "how ranks exchange tensors; shm: shared memory of one host; auto: nccl between GPUs, shm on one host, or gloo",
    )
    profile_comm: bool = option(
        False, "at the end, show how long ranks exchanged tensors and waited for each other", local=True
    )
    distributed_executor_backend: Backend = option(
        "auto",
        "uni: one rank in this process; threads: a thread for each rank; mp: a process for each rank; ray: processes "
        "in a Ray cluster; external_launcher: torchrun has started a process for each rank; auto: uni or mp, or ray in "
        "a placement group or if this host has too few devices",
        local=True,
    )
    data_parallel_backend: DataParallelBackend = option(
        "mp",
        "mp: replicas on this host and on headless hosts; ray: replicas in a Ray cluster",
        short="-dpb",
        local=True,
    )
    device: Device = option("auto", "the device of each rank; auto: cuda if there is one")
    num_devices: int | None = option(None, "override the number of devices found on this host", minimum=1, local=True)
    cpu_cores: Cores | None = option(
        None,
        "cores of this host for the ranks: 0-3 is divided among them, 0-3|4-7 is a list for each; auto: all; nobind: "
        "all, without binding threads to cores",
        parse=parse_cores,
        metavar="CORES",
        local=True,
    )
    engine_process: bool = option(False, "run the engine in its own process", local=True)
    warm_spares: int | None = option(
        None,
        "1: each replica keeps a process on each of its hosts that has loaded all but the model, from which ranks that "
        "die are replaced at once; 0: none; auto: 1 while serving, if there are several ranks and memory allows",
        minimum=0,
        local=True,
    )
    start_timeout: float = option(600.0, "seconds that a phase of the start may take", minimum=1, local=True)
    step_timeout: float = option(300.0, "seconds that a step may take", minimum=1, local=True)


@dataclass(frozen=True, slots=True)
class TraceOptions:
    """Traces"""

    trace: str | None = option(
        None,
        "write a trace of steps, layers, communication and requests for ui.perfetto.dev, packed if the name ends in "
        ".gz; a folder: only between start_profile and stop_profile",
        metavar="FILE",
        local=True,
    )
    trace_events: int = option(
        2_000_000, "events after which a trace ends; each takes 120 bytes", minimum=1, local=True
    )


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """KV cache"""

    block_size: int = option(16, "tokens in a KV block", minimum=1)
    gpu_memory_utilization: float = option(0.9, "share of a GPU's memory that a rank may use, in (0, 1]", local=True)
    device_memory: int | None = option(
        None,
        "memory of each rank for weights, KV cache and everything else: 512MiB, 2GiB, ...",
        minimum=1,
        bytes_=True,
        local=True,
    )
    kv_cache_memory_bytes: int | None = option(
        None, "size of each rank's KV cache; overrides the other memory options", minimum=1, bytes_=True, local=True
    )
    kv_cache_dtype: KVCacheDtype = option(
        "auto",
        "type of keys and values in the KV cache; auto: that of the activations; int8: 8 bits, with a scale for each "
        "token and head, which vLLM calls int8_per_token_head; fp8 is fp8_e4m3, which has no scales",
    )
    enable_prefix_caching: bool = option(True, "keep KV blocks for later prompts that begin with the same tokens")


@dataclass(frozen=True, slots=True)
class SchedulerOptions:
    """Scheduling"""

    max_num_seqs: int = option(256, "the most requests that run at the same time", minimum=1)
    max_num_batched_tokens: int = option(2048, "the most tokens computed in one step", minimum=1)
    scheduling_policy: SchedulingPolicy = option(
        "priority",
        "priority: a request may have a priority (the lowest runs first); fcfs: in order of arrival, and a request "
        "with a priority is refused",
        local=True,
    )
    max_in_flight: int | None = option(
        None,
        "steps that are sent to the ranks before the tokens of the first are known; auto: the number of stages plus 1",
        minimum=1,
    )


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """A replica over several nodes"""

    nnodes: int = option(
        1, "hosts that share the ranks; each runs this command with a rank of its own", short="-n", minimum=1
    )
    node_rank: int = option(0, "number of this host among them; host 0 leads", short="-r", minimum=0, local=True)
    master_addr: str | None = option(None, "address of host 0, where the others come", local=True)
    master_port: int = option(29501, "port at that address", minimum=1, maximum=65535, local=True)
    placement: Placement = option(
        "auto",
        "where ranks run; auto: tensor-parallel groups on one host each, if they fit; tp-across: each group over all "
        "hosts; 0=0-3|1=4-7: the ranks of each host",
        parse=parse_placement,
        metavar="PLACEMENT",
    )
    topology: str | None = option(
        None,
        "file that `shoal doctor --output` has written: ranks that exchange much get the fastest of the measured links",
        metavar="FILE",
        local=True,
    )
    measure_links: bool = option(
        False, "measure the links between the hosts at the start, in some seconds, and place ranks by them", local=True
    )
    port_range: tuple[int, int] | None = option(
        None,
        "the only ports that may be opened for other hosts; --master-port must be one of them",
        parse=parse_ports,
        metavar="FIRST-LAST",
        local=True,
    )
    spare_hosts: int = option(
        0,
        "hosts beyond --nnodes that wait, with the next node ranks, and take the place of one that is gone",
        minimum=0,
    )
    ray_address: str | None = option(
        None, "host:port of the Ray cluster; auto: RAY_ADDRESS, or the cluster of this host", local=True
    )
    ray_resources: Mapping[str, float] | None = option(
        None,
        'what each rank takes of Ray\'s resources: {"GPU": 1, "my-accelerator": 0.5}; auto: 1 GPU or 1 CPU',
        parse=parse_resources,
        metavar="JSON",
        local=True,
    )


@dataclass(frozen=True, slots=True)
class HostOptions:
    """Several hosts"""

    data_parallel_size_local: int | None = option(
        None,
        "replicas that run on this host; auto: all, from the first one here",
        short="-dpl",
        minimum=0,
        local=True,
    )
    data_parallel_start_rank: int | None = option(
        None, "number of the first replica on this host", short="-dpr", minimum=0, local=True
    )
    data_parallel_rank: int | None = option(
        None, "serve this replica only, at an address of its own", short="-dpn", minimum=0, local=True
    )
    data_parallel_address: str | None = option(
        None, "address of the first host, where the replicas of all hosts meet", short="-dpa", local=True
    )
    data_parallel_rpc_port: int | None = option(
        None, "port of --data-parallel-address", short="-dpp", minimum=1, maximum=65535, local=True
    )
    data_parallel_hybrid_lb: bool = option(
        False, "serve the replicas of this host at an address of their own", short="-dph", local=True
    )
    headless: bool = option(False, "run replicas for a server on another host; nothing is served here", local=True)


@dataclass(frozen=True, slots=True)
class ClusterTlsOptions:
    """Encryption"""

    cluster_tls: str | None = option(
        None,
        "folder with ca.pem, cert.pem and key.pem: encrypt connections between hosts; `shoal cluster-keys` makes it",
        metavar="DIR",
        local=True,
    )
    cluster_tls_ca: str | None = option(
        None, "instead of the folder: certificate of the cluster's CA", metavar="FILE", local=True
    )
    cluster_tls_cert: str | None = option(
        None, "instead of the folder: certificate of this host", metavar="FILE", local=True
    )
    cluster_tls_key: str | None = option(
        None, "instead of the folder: private key of the certificate", metavar="FILE", local=True
    )


@dataclass(frozen=True, slots=True)
class ServingOptions:
    """Requests and restarts"""

    max_queued_requests: int = option(
        4096, "requests that may wait for a replica; further ones are answered with 429", minimum=0, local=True
    )
    max_queue_wait: float | None = option(
        None, "seconds that a request may wait for a replica before it is answered with 503", minimum=0, local=True
    )
    request_timeout: float | None = option(
        None, "seconds that a request may take in all; one that takes longer ends with 503", minimum=0, local=True
    )
    max_restarts: int = option(20, "restarts of a replica that are allowed within an hour", minimum=0, local=True)


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """All options, section by section."""

    model: str | None  # None: the bundled one
    model_options: ModelOptions = field(default_factory=ModelOptions)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    tracing: TraceOptions = field(default_factory=TraceOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    scheduler: SchedulerOptions = field(default_factory=SchedulerOptions)
    nodes: NodeOptions = field(default_factory=NodeOptions)
    hosts: HostOptions = field(default_factory=HostOptions)
    tls: ClusterTlsOptions = field(default_factory=ClusterTlsOptions)
    serving: ServingOptions = field(default_factory=ServingOptions)

    @classmethod
    def from_flat(cls, model: str | None, values: Mapping[str, Any]) -> "EngineOptions":
        """Sort `values` (option name -> value) into the sections.

        Raises:
            ConfigError: a name is unknown, or a value has the wrong type or is out of range.
        """
        known = {known.name: known for known in options()}
        for name in values:
            if name not in known:
                explanation = vllm_options.explain(name)
                raise ConfigError(
                    f"unknown option {name}{f': {explanation}' if explanation else nearest(name, list(known))}"
                )
        sections: dict[str, Any] = {}
        for section, section_type in SECTIONS.items():
            names = {f.name for f in dataclasses.fields(section_type)}
            checked = {name: known[name].check(value) for name, value in values.items() if name in names}
            sections[section] = section_type(**checked)
        utilization = sections["cache"].gpu_memory_utilization
        if not 0 < utilization <= 1:
            raise ConfigError(f"--gpu-memory-utilization must be in (0, 1], got {utilization}")
        return cls(model=model, **sections)


def agreed(options: EngineOptions) -> dict[str, str]:
    """Return the options that must be the same in all processes of a job: flag -> value."""
    found = {}
    for section in SECTIONS:
        values = getattr(options, section)
        for each in dataclasses.fields(values):
            if not each.metadata["local"]:
                found["--" + each.name.replace("_", "-")] = str(getattr(values, each.name))
    return found


SECTIONS: dict[str, type] = {
    "model_options": ModelOptions,
    "parallel": ParallelOptions,
    "tracing": TraceOptions,
    "cache": CacheOptions,
    "scheduler": SchedulerOptions,
    "nodes": NodeOptions,
    "hosts": HostOptions,
    "tls": ClusterTlsOptions,
    "serving": ServingOptions,
}
ONLINE = ("hosts", "serving")  # sections for `shoal serve` and AsyncLLM only


def options() -> Iterator[Option]:
    """Yield every option, section by section."""
    for name, section in SECTIONS.items():
        hints = get_type_hints(section)
        for f in dataclasses.fields(section):
            hint = hints[f.name]
            alternatives = [a for a in get_args(hint) if a is not type(None)]
            literal = get_origin(hint) is Literal
            optional = type(None) in get_args(hint)
            own_form = f.metadata["parse"] is not None
            yield Option(
                name=f.name,
                group=section.__doc__ or "",
                type=str if literal or own_form else alternatives[0] if optional else hint,
                default=f.default,
                choices=tuple(alternatives) if literal else (),
                optional=optional,
                help=f.metadata["help"],
                short=f.metadata["short"],
                minimum=f.metadata["minimum"],
                maximum=f.metadata["maximum"],
                bytes=f.metadata["bytes"],
                parse=f.metadata["parse"],
                metavar=f.metadata["metavar"],
                online=name in ONLINE,
            )


def refuse_online(given: Mapping[str, Any]) -> None:
    """Refuse options that are for `shoal serve` and AsyncLLM only.

    Raises:
        ConfigError: one of them is given.
    """
    for option_ in options():
        if option_.online and given.get(option_.name) not in (None, False):
            raise ConfigError(f"{option_.flag} is for `shoal serve` and AsyncLLM: leave it out here")


def from_environment(*, online: bool = False) -> dict[str, Any]:
    """Return the options that environment variables set, by name; flags and arguments of `LLM(...)` go over them.

    Args:
        online: include options for `shoal serve` and AsyncLLM.

    Raises:
        ConfigError: the value of a variable is not one of its option; the variable is named.
    """
    found = {}
    for option_ in options():
        given = env.option(option_.name) if online or not option_.online else None
        if given is not None:
            variable, text = given
            found[option_.name] = option_.read(text, variable)
    return found


def strange_variables() -> list[str]:
    """Return a warning for each SHOAL_* variable that is set and that nothing reads."""
    names = [option_.name for option_ in options()]
    settings = [
        variable.name.removeprefix(env.PREFIX) for variable in env.SETTINGS if variable.name.startswith(env.PREFIX)
    ]
    known = settings + [name.upper() for name in names]
    warnings = []
    for name in env.unknown_variables(names):
        plain = name.removeprefix(env.PREFIX)
        near = closest(plain, known)
        hint = f"did you mean {env.PREFIX}{near}?" if near else "docs/flags.md lists those that are"
        warnings.append(f"the environment variable {name} is not read; {vllm_options.explain(plain) or hint}")
    return warnings
