"""The options with a form of their own, such as lists and JSON objects: how each is read."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from shoal.config.option import nearest
from shoal.errors import ConfigError
from shoal.values import shown, whole_number

_LARGEST_SHARE = 10**6  # of `tensor_parallel_split`
_MOST_LAYERS = 10**4  # of a stage
_MOST_DRAFTS = 64
_MOST_CORES = 1 << 14
_INT8_OF_VLLM = ("experts_int8", "tpu_int8", "int8_per_channel_weight_only")
_FORMATS_OF_VLLM = (
    "auto-round", "auto_gptq", "awq", "awq_marlin", "bitblas", "bitsandbytes", "compressed-tensors", "cpu_awq",
    "cpu_gptq", "deepspeedfp", "fbgemm_fp8", "fp8", "fp8_per_block", "fp8_per_tensor", "fp_quant", "gguf", "gptq",
    "gptq_bitblas", "gptq_marlin", "gptq_marlin_24", "hqq", "humming", "inc", "ipex", "modelopt", "modelopt_fp4",
    "modelopt_mixed", "modelopt_mxfp8", "moe_wna16", "mxfp4", "mxfp8", "nvfp4", "online", "petit_nvfp4", "ptpc_fp8",
    "quark", "rtn", "torchao",
)  # fmt: skip

Quantization = Literal["int8", "int4", "int4-g32", "int4-g64", "int4-g128"]

Placement = str | tuple[tuple[str, tuple[int, ...]], ...]  # a rule, or for each host its name and its ranks

Cores = tuple[tuple[int, ...], ...]  # a list for each rank, or one that ranks share; (): ranks are not bound to cores


@dataclass(frozen=True, slots=True)
class SpeculativeConfig:
    """The way in which tokens are drafted: from the text so far (`ngram`), or by a smaller model (`draft_model`)."""

    method: Literal["ngram", "draft_model"]
    num_speculative_tokens: int = 5  # drafted at a time
    prompt_lookup_max: int = 4  # ngram: the most tokens that are searched for in the text so far
    prompt_lookup_min: int = 2  # ngram: the fewest
    model: str | None = None  # draft_model: its folder, or its id on the hub
    revision: str | None = None


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


def parse_quantization(value: Any, flag: str) -> str:
    """Read the name of a way to keep weights in fewer bits.

    Raises:
        ConfigError: the value is something else; vLLM's formats are refused by name.
    """
    known = get_args(Quantization)
    if value in known:
        return str(value)
    if value in _INT8_OF_VLLM:
        raise ConfigError(f"{flag} {value} is vLLM's name: use {flag} int8, which also keeps experts in 8 bits")
    if value in _FORMATS_OF_VLLM:
        raise ConfigError(
            f"{flag} {value}: Shoal does not have this format of vLLM's yet: use {flag} int8 or int4, or leave it out; "
            "whether a checkpoint is quantized is read from its config.json"
        )
    raise ConfigError(f"{flag} takes {', '.join(known[:-1])} or {known[-1]}, got {shown(value)}")


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


def parse_resources(value: Any, flag: str) -> Mapping[str, float]:
    """Read a mapping of names to positive numbers, or a text with such a JSON object: `{"GPU": 0.5}`.

    Raises:
        ConfigError: the value is something else.
    """
    found = parse_overrides(value, flag)
    numbers = [amount for amount in found.values() if type(amount) in (int, float) and amount > 0]
    if not found or len(numbers) < len(found):
        raise ConfigError(f'{flag} takes an amount for each resource, such as {{"GPU": 1}}, got {shown(value)}')
    return {name: float(amount) for name, amount in found.items()}


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


def parse_placement(value: Any, flag: str) -> Placement:
    """Read `auto`, `tp-across`, or the ranks of each host: `0=0-3|1=4-7`, `host-a=0,1|host-b=2,3`.

    Raises:
        ConfigError: the value is something else.
    """
    if value in ("auto", "tp-across"):
        return str(value)
    if isinstance(value, tuple | list):
        value = "|".join(f"{name}={','.join(map(str, ranks))}" for name, ranks in value)
    placed = []
    for part in str(value).split("|"):
        host, equals, listed = part.partition("=")
        ranks = _cores(listed) if host.strip() and equals else None
        if ranks is None:
            raise ConfigError(
                f"{flag} takes auto, tp-across, or the ranks of each host, such as 0=0-3|1=4-7, got {shown(value)}"
            )
        placed.append((host.strip(), ranks))
    return tuple(placed)


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


def parse_ports(value: Any, flag: str) -> tuple[int, int]:
    """Read a range of ports, `31000-31099`, or a pair of numbers.

    Raises:
        ConfigError: the value is something else.
    """
    parts = value.split("-") if isinstance(value, str) else value
    if isinstance(parts, list | tuple) and len(parts) == 2:
        first, last = (whole_number(part.strip(" ")) if isinstance(part, str) else part for part in parts)
        if type(first) is int and type(last) is int and 0 < first <= last < 1 << 16:
            return first, last
    raise ConfigError(f"{flag} takes the first and the last port, such as 31000-31099, got {shown(value)}")


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
        raise ConfigError(f"{flag}: revision must be a string, got {shown(revision)}")
