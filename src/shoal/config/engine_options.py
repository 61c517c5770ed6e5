"""The options of an engine. Each is written once, here; flags, `LLM(...)`, variables and docs derive from it.

None means that the planner decides; it logs what and why.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from shoal import env
from shoal.config import vllm_options
from shoal.errors import ConfigError
from shoal.values import closest, decimal_number, shown, whole_number

Dtype = Literal["auto", "float32", "bfloat16", "float16", "float", "half"]
LoadFormat = Literal["auto", "dummy"]
Device = Literal["auto", "cpu", "cuda"]
Executor = Literal["uni", "threads", "mp"]
Backend = Literal["auto", Executor]
ExpertPlacement = Literal["linear", "round_robin"]
All2All = Literal["auto", "allgather_reducescatter", "all_to_all"]
SchedulingPolicy = Literal["priority", "fcfs"]
ModelImpl = Literal["auto", "shoal", "transformers"]
GenerationConfig = Literal["auto", "vllm"]

T = TypeVar("T")

LARGEST = 2**63 - 1  # the largest integer that every message between processes can carry
_LARGEST_SHARE = 10**6  # of `tensor_parallel_split`
_MOST_LAYERS = 10**4  # of a stage
_MOST_DRAFTS = 64
_MOST_CORES = 1 << 14


@dataclass(frozen=True, slots=True)
class SpeculativeConfig:
    """The way in which tokens are drafted: from the text so far (`ngram`), or by a smaller model (`draft_model`)."""

    method: Literal["ngram", "draft_model"]
    num_speculative_tokens: int = 5  # drafted at a time
    prompt_lookup_max: int = 4  # ngram: the most tokens that are searched for in the text so far
    prompt_lookup_min: int = 2  # ngram: the fewest
    model: str | None = None  # draft_model: its folder, or its id on the hub
    revision: str | None = None


def option(
    default: T,
    help: str,
    *,
    short: str | None = None,
    minimum: float | None = None,
    maximum: int = LARGEST,
    bytes_: bool = False,
    parse: Callable[[Any, str], Any] | None = None,
    metavar: str | None = None,
    local: bool = False,
) -> T:
    """Declare an option.

    Args:
        short: a second flag.
        maximum: of an integer.
        bytes_: sizes such as 512MiB and 2GiB are allowed.
        parse: called with the value and the flag, for options with a form of their own.
        local: the processes of one job may have different values.
    """
    found: T = field(
        default=default,
        metadata={
            "help": help,
            "short": short,
            "minimum": minimum,
            "maximum": maximum,
            "bytes": bytes_,
            "parse": parse,
            "metavar": metavar,
            "local": local,
        },
    )
    return found


def parse_split(value: Any, flag: str) -> tuple[int, ...]:
    """Read relative shares of ranks: `2,1,1`, or a list of numbers.

    Raises:
        ConfigError: the value is something else.
    """
    return _positives(value, flag, _LARGEST_SHARE, "one for each rank, such as 2,1,1")


def parse_partition(value: Any, flag: str) -> tuple[int, ...]:
    """Read the number of layers of each stage: `16,16`, or a list of numbers.

    Raises:
        ConfigError: the value is something else.
    """
    meaning = "the number of layers of each stage (16,16 for a model of 32 layers and two stages)"
    return _positives(value, flag, _MOST_LAYERS, meaning)


def _positives(value: Any, flag: str, largest: int, meaning: str) -> tuple[int, ...]:
    parts = value.split(",") if isinstance(value, str) else value
    if isinstance(parts, Sequence) and not isinstance(parts, bytes | bytearray | memoryview) and parts:
        numbers: tuple[Any, ...] = tuple(
            whole_number(part.strip(" ")) if isinstance(part, str) else part for part in parts
        )
        if all(type(number) is int and 0 < number <= largest for number in numbers):
            return numbers
    raise ConfigError(f"{flag} takes positive integers up to {largest}, {meaning}, got {shown(value)}")


def parse_overrides(value: Any, flag: str) -> Mapping[str, Any]:
    """Read a mapping, or a text with a JSON object: `{"rope_scaling": {"rope_type": "linear", "factor": 2.0}}`.

    Raises:
        ConfigError: the value is no object, or something in it is not JSON.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{flag} is not JSON: {error}") from None
    try:
        found = json.loads(json.dumps(value, allow_nan=False))  # a copy of our own, whose keys are texts
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{flag} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f'{flag} takes a JSON object such as {{"rope_theta": 500000.0}}, got {shown(value)}')
    return found


Cores = tuple[tuple[int, ...], ...]  # a list for each rank, or one that ranks share; (): ranks are not bound to cores


def parse_cores(value: Any, flag: str) -> Cores | None:
    """Read `0-3`, `0-3|4-7`, `0,2|1,3`, `nobind`, or lists of numbers; `auto` gives None.

    Raises:
        ConfigError: the value is something else.
    """
    if value == "auto":
        return None
    if value in ("nobind", "none"):
        return ()
    lists = str(value).split("|") if isinstance(value, str | int) and not isinstance(value, bool) else value
    found = [_cores(each) for each in lists] if isinstance(lists, list | tuple) and lists else [None]
    if any(each is None for each in found):
        raise ConfigError(
            f"{flag} takes auto, nobind, or cores such as 0-3, with | between the cores of ranks (0-3|4-7), "
            f"got {shown(value)}"
        )
    cores = tuple(each for each in found if each is not None)
    named = [core for each in cores for core in each]
    if len(set(named)) < len(named):
        raise ConfigError(f"{flag} names a core twice, got {shown(value)}")
    return cores


def _cores(given: Any) -> tuple[int, ...] | None:
    """Return the cores of one list, or None if the value is not such a list."""
    if isinstance(given, list | tuple):
        whole = bool(given) and all(type(core) is int and 0 <= core < _MOST_CORES for core in given)
        return tuple(given) if whole else None
    found: list[int] = []
    for part in str(given).split(","):
        match = re.fullmatch(r"\s*(\d{1,5})(?:\s*-\s*(\d{1,5}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < _MOST_CORES:
            return None
        found += range(first, last + 1)
    return tuple(found)


def parse_speculative(value: Any, flag: str) -> SpeculativeConfig:
    """Read a mapping, or a text with a JSON object: `{"method": "ngram", "num_speculative_tokens": 4}`.

    Raises:
        ConfigError: the value is no object, or has an unknown key or a value out of range.
    """
    if isinstance(value, SpeculativeConfig):
        return value
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{flag} is not JSON: {error}") from None
    if not isinstance(value, Mapping):
        raise ConfigError(f'{flag} takes a JSON object such as {{"method": "ngram"}}, got {shown(value)}')
    known = [f.name for f in dataclasses.fields(SpeculativeConfig)]
    for name in value:
        if name not in known:
            raise ConfigError(f"{flag}: unknown key {shown(name)}{nearest(shown(name), known)}")
    given = dict(value)
    given.setdefault("method", "draft_model" if given.get("model") else None)
    _check_method(given, flag)
    for name in ("num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min"):
        number = given.get(name, 1)
        if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= _MOST_DRAFTS:
            raise ConfigError(f"{flag}: {name} must be an integer in [1, {_MOST_DRAFTS}], got {shown(number)}")
    if "prompt_lookup_max" in given or "prompt_lookup_min" in given:
        longest = given.setdefault("prompt_lookup_max", max(4, given.get("prompt_lookup_min", 0)))
        shortest = given.setdefault("prompt_lookup_min", min(2, longest))
        if shortest > longest:
            raise ConfigError(f"{flag}: prompt_lookup_min {shortest} is more than prompt_lookup_max {longest}")
    return SpeculativeConfig(**given)


def _check_method(given: Mapping[str, Any], flag: str) -> None:
    """Check that the method is known, and that its keys are given and not those of the other method.

    Raises:
        ConfigError: as it says.
    """
    method = given["method"]
    if method not in ("ngram", "draft_model"):
        raise ConfigError(f"{flag}: method must be ngram or draft_model, got {shown(method)}")
    others = ("model", "revision") if method == "ngram" else ("prompt_lookup_max", "prompt_lookup_min")
    for name in others:
        if given.get(name) is not None:
            raise ConfigError(f"{flag}: method {method} does not use {name}: leave it out or change the method")
    if method == "draft_model" and not (isinstance(given.get("model"), str) and given["model"]):
        raise ConfigError(f"{flag}: method draft_model needs model, a folder or an id on the hub")
    revision = given.get("revision")
    if revision is not None and not isinstance(revision, str):
        raise ConfigError(f"{flag}: revision must be a text, got {shown(revision)}")


def nearest(name: str, known: Sequence[str]) -> str:
    """Return the end of a message about an unknown name: the closest known one, or all of them."""
    near = closest(name, known)
    return f"; did you mean {near}?" if near else f"; known are {', '.join(known)}"


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Model"""

    revision: str | None = option(None, "branch, tag or commit of a model on the hub")
    tokenizer: str | None = option(
        None, "folder or id on the hub whose tokenizer and chat template are used instead of the model's"
    )
    tokenizer_revision: str | None = option(None, "branch, tag or commit of the tokenizer on the hub")
    dtype: Dtype = option(
        "auto", "type of weights and activations; auto: that of the checkpoint; float and half are float32 and float16"
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
    enforce_eager: bool = option(False, "launch operations one by one; this version always does")


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
    distributed_executor_backend: Backend = option(
        "auto",
        "uni: one rank in this process; threads: a thread for each rank; mp: a process for each rank; auto: uni or mp",
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
    start_timeout: float = option(600.0, "seconds that a phase of the start may take", minimum=1, local=True)
    step_timeout: float = option(300.0, "seconds that a step may take", minimum=1, local=True)


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
    cache: CacheOptions = field(default_factory=CacheOptions)
    scheduler: SchedulerOptions = field(default_factory=SchedulerOptions)
    hosts: HostOptions = field(default_factory=HostOptions)
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
                told = vllm_options.explain(name)
                raise ConfigError(f"unknown option {name}{f': {told}' if told else nearest(name, list(known))}")
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
    "cache": CacheOptions,
    "scheduler": SchedulerOptions,
    "hosts": HostOptions,
    "serving": ServingOptions,
}
ONLINE = ("hosts", "serving")  # sections for `shoal serve` and AsyncLLM only


@dataclass(frozen=True, slots=True)
class Option:
    """The description of an option, as flags, `LLM(...)` and the docs need it."""

    name: str
    group: str
    type: type  # int, float, str or bool; str where `parse` is set
    default: Any
    choices: tuple[str, ...]
    optional: bool
    help: str
    short: str | None
    minimum: float | None
    maximum: int  # of an integer
    bytes: bool
    parse: Callable[[Any, str], Any] | None
    metavar: str | None
    online: bool  # for `shoal serve` and AsyncLLM only

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    def read(self, text: str, name: str) -> Any:
        """Read the value from a text, as environment variables have it.

        Raises:
            ConfigError: the text is not a value of this option; the message calls the option `name`.
        """
        value: Any = text
        if self.type is bool:
            value = _SWITCH_WORDS.get(text.lower(), text)
        elif self.type in (int, float) and not self.bytes:
            value = read_number(text, self.type)
        return self.check(value, name)

    def check(self, value: Any, name: str = "") -> Any:
        """Return the value in the option's type.

        Raises:
            ConfigError: the value has another type or is out of range; the message calls the option `name`, or by its
                flag.
        """
        name = name or self.flag
        if value is None and self.optional:
            return None
        if self.parse is not None:
            return self.parse(value, name)
        if self.bytes and isinstance(value, str):
            value = parse_bytes(value, name)
        wanted = int | float if self.type is float else self.type
        if not isinstance(value, wanted) or (isinstance(value, bool) and self.type is not bool):
            raise ConfigError(f"{name} takes {_TYPE_NAMES[self.type]}, got {shown(value)}")
        if self.choices and value not in self.choices:
            raise ConfigError(f"{name} must be one of {', '.join(self.choices)}, got {shown(value)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name} takes a finite number, got {value}")
        if self.minimum is not None and isinstance(value, int | float) and not value >= self.minimum:
            raise ConfigError(f"{name} must be at least {self.minimum:g}, got {shown(value)}")
        if isinstance(value, int) and abs(value) > self.maximum:  # it may be too large for a float, too
            raise ConfigError(f"{name} must be at most {self.maximum}, got {shown(value)}")
        return float(value) if isinstance(value, int) and self.type is float else value


def read_number(text: str, kind: type) -> Any:
    """Return the number in a text, which may be NaN or infinite; or else the text, which `Option.check` refuses."""
    if kind is float and text.lower() in _NOT_FINITE:
        return float(text)
    number = whole_number(text) if kind is int else decimal_number(text)
    return text if number is None else number


_NOT_FINITE = ("nan", "inf", "-inf")
_SWITCH_WORDS = {**dict.fromkeys(("1", "true", "yes", "on"), True), **dict.fromkeys(("0", "false", "no", "off"), False)}
_TYPE_NAMES = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str, flag: str) -> int:
    """Read a number of bytes: `1500000`, `512MiB`, `2GiB`, `1.5g`.

    Raises:
        ConfigError: the text is something else.
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([kmgt]i?)?b?\s*", text.lower(), re.ASCII)
    if not match:
        raise ConfigError(f"{flag} takes a number of bytes such as 512MiB or 2GiB, got {text!r}")
    unit = _UNITS[match[2] or ""]
    return int(match[1]) * unit if match[1].isdigit() else int(float(match[1]) * unit)


def format_bytes(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} bytes"


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
