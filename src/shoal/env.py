"""The one place that reads environment variables."""

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass

from shoal.addresses import is_local, parse_host
from shoal.errors import ConfigError
from shoal.process import import_path
from shoal.values import whole_number

PREFIX = "SHOAL_"
_MAX_KEY_CHARS = 1 << 16
_LEVELS = ("debug", "info", "warning", "error", "critical")


@dataclass(frozen=True, slots=True)
class Variable:
    name: str
    help: str
    alias: str | None = None  # vLLM's name for it, which is read if the other is not set


API_KEY = ("SHOAL_API_KEY", "VLLM_API_KEY")  # flags read them; child processes do not inherit them
_CPU_KV_CACHE = "VLLM_CPU_KVCACHE_SPACE"
_MAX_GIB = 1 << 20
_RAY_GPUS = "VLLM_RAY_PER_WORKER_GPUS"

SETTINGS: tuple[Variable, ...] = (
    Variable(
        API_KEY[0],
        "used if --api-key is not given: the keys that `shoal serve` accepts, separated by spaces, and the key that "
        "`bench serve`, `top` and `scale` send; unlike the flag, `ps` does not show it",
        API_KEY[1],
    ),
    Variable(_CPU_KV_CACHE, "GiB of each rank's KV cache on CPUs, if no option sets it; 0: the default size"),
    Variable("SHOAL_LOG_LEVEL", f"lowest level in the log on stderr: {', '.join(_LEVELS)}", "VLLM_LOGGING_LEVEL"),
    Variable("SHOAL_CLUSTER_KEY", "a secret that processes on different hosts share, so that no others can join them"),
    Variable("SHOAL_CLUSTER_KEY_FILE", "a file with that secret, which only its owner may read"),
    Variable(
        "SHOAL_HOST_IP",
        "the address of this host as other hosts reach it; by default the one from which it connects to the first host",
        "VLLM_HOST_IP",
    ),
    Variable(
        "GLOO_SOCKET_IFNAME", "the network interface of ranks on CPUs; by default that of the address of this host"
    ),
    Variable(
        "NCCL_SOCKET_IFNAME", "the network interfaces of ranks on GPUs; by default that of the address of this host"
    ),
    Variable("CUDA_VISIBLE_DEVICES", "the GPUs of this host that Shoal may use"),
    Variable("RAY_ADDRESS", "host:port of the Ray cluster, if --ray-address is not given"),
    Variable(_RAY_GPUS, "GPUs that a rank takes in a Ray cluster, or the part of one, if --ray-resources is not given"),
    Variable("HF_HUB_OFFLINE", "1: download nothing from the hub"),
    Variable("HF_TOKEN", "the token for models on the hub that need a login"),
    Variable("HF_HOME", "the folder for models from the hub"),
)

_DATA_PARALLEL = {
    "RANK": "the rank of this process in a data-parallel job that is started by hand",
    "SIZE": "the number of processes of that job",
    "RANK_LOCAL": "the rank of this process on its host; needed if several processes share a host, with the next one",
    "SIZE_LOCAL": "the number of processes on its host; by default all if the master is on loopback, otherwise one",
    "MASTER_IP": "the address at which rank 0 listens",
    "MASTER_PORT": "the port at which rank 0 listens",
}
SETTINGS += tuple(Variable(f"SHOAL_DP_{name}", text, f"VLLM_DP_{name}") for name, text in _DATA_PARALLEL.items())

# torchrun sets these for each process that it starts.
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")

SOCKET_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")

# The variables of the leader that ranks on other hosts get too, except those of one host, and secrets.
_SHARED_PREFIXES = ("NCCL_", "GLOO_", "HF_", "SHOAL_", "VLLM_", "TORCH_")
_OF_ONE_HOST = ("_SOCKET_IFNAME", "_HOST_IP")
_PER_PROCESS = ("SHOAL_DP_", "VLLM_DP_")
_SECRETS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL")

# vLLM's variables that mean the same as one of our options.
OPTION_ALIASES = {
    "pipeline_layer_partition": "VLLM_PP_LAYER_PARTITION",
    "step_timeout": "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS",
    "start_timeout": "VLLM_ENGINE_READY_TIMEOUT_S",
    "engine_process": "VLLM_ENABLE_V1_MULTIPROCESSING",
    "cpu_cores": "VLLM_CPU_OMP_THREADS_BIND",
}


def option_variable(name: str) -> str:
    """Return the name of the variable of an engine option: `block_size` -> SHOAL_BLOCK_SIZE."""
    return PREFIX + name.upper()


def option(name: str) -> tuple[str, str] | None:
    """Return the variable that sets an engine option and its text, or None. An empty variable counts as not set."""
    return _first(option_variable(name), OPTION_ALIASES.get(name))


def unknown_variables(options: Iterable[str]) -> list[str]:
    """Return the SHOAL_* variables that are set but that Shoal does not know."""
    known = {variable.name for variable in SETTINGS} | {option_variable(name) for name in options}
    return sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known)


def log_level() -> str:
    """Return the value of SHOAL_LOG_LEVEL in upper case.

    Raises:
        ConfigError: there is no such level.
    """
    variable, level = _first("SHOAL_LOG_LEVEL", "VLLM_LOGGING_LEVEL") or ("", "info")
    if level.lower() not in _LEVELS:
        raise ConfigError(f"{variable} must be one of {', '.join(_LEVELS)}, got {level!r}")
    return level.upper()


@dataclass(frozen=True, slots=True)
class DataParallel:
    """One process of a data-parallel job that was started by hand."""

    rank: int
    size: int
    rank_local: int
    size_local: int
    master_ip: str
    master_port: int
    local_assumed: bool = False  # True if it is only assumed that this process is alone on its host


def data_parallel() -> DataParallel | None:
    """Read SHOAL_DP_* (or VLLM_DP_*). Return None if neither rank nor size is set.

    If the master is on loopback all processes are on one host, so the local rank and size have defaults.

    Raises:
        ConfigError: a variable is missing, or is not a number in its range.
    """
    if not _first("SHOAL_DP_RANK", "VLLM_DP_RANK") and not _first("SHOAL_DP_SIZE", "VLLM_DP_SIZE"):
        return None
    size = _dp_number("SIZE", 1, 10**6)
    rank = _dp_number("RANK", 0, size - 1)
    variable, text = _first("SHOAL_DP_MASTER_IP", "VLLM_DP_MASTER_IP") or ("", "127.0.0.1")
    master = parse_host(text, variable)
    one_host = is_local(master)
    is_set = _first("SHOAL_DP_SIZE_LOCAL", "VLLM_DP_SIZE_LOCAL") is not None
    size_local = _dp_number("SIZE_LOCAL", 1, size, default=size if one_host else 1)
    rank_local = _dp_number("RANK_LOCAL", 0, size_local - 1, default=rank % size_local)
    port = _dp_number("MASTER_PORT", 1, 65535)
    return DataParallel(rank, size, rank_local, size_local, master, port, not (is_set or one_host))


def _dp_number(name: str, lowest: int, highest: int, default: int | None = None) -> int:
    variable, text = _first(f"SHOAL_DP_{name}", f"VLLM_DP_{name}") or (f"SHOAL_DP_{name}", "")
    if not text and default is not None:
        return default
    if not text:
        raise ConfigError(f"{variable} is not set: a process of a data-parallel job needs it, counted from {lowest}")
    number = whole_number(text)
    if number is None or not lowest <= number <= highest:
        raise ConfigError(f"{variable} must be an integer from {lowest} to {highest}, got {text!r}")
    return number


@dataclass(frozen=True, slots=True)
class Torchrun:
    """The place of this process among those that torchrun has started. A group is the processes of one host."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    group: int
    num_groups: int
    master_addr: str


def torchrun() -> Torchrun | None:
    """Read the variables of torchrun. Return None if neither RANK nor WORLD_SIZE is set.

    Raises:
        ConfigError: a variable is missing, or is not a number in its range.
    """
    if not _first("RANK", "WORLD_SIZE"):
        return None
    numbers = {}
    for name in _TORCHRUN:
        _, text = _first(name) or ("", "")
        number = whole_number(text) if text else None
        if number is None or number < 0:
            raise ConfigError(f"{name} must be a number that torchrun has set, got {text!r}: start this with torchrun")
        numbers[name] = number
    _, master = _first("MASTER_ADDR") or ("", "")
    if not master:
        raise ConfigError("MASTER_ADDR is not set: start this with torchrun")
    rank, size, local_rank, local_size, group, groups = numbers.values()
    return Torchrun(rank, size, local_rank, local_size, group, groups, parse_host(master, "MASTER_ADDR"))


def host_ip() -> tuple[str, str] | None:
    """Return the address that the user has named for this host, after the name of the variable; None: there is none.

    Raises:
        ConfigError: it is not the form of an address.
    """
    found = _first("SHOAL_HOST_IP", "VLLM_HOST_IP")
    return found and (found[0], parse_host(found[1], found[0]))


def socket_interfaces() -> dict[str, str]:
    """Return the variables that name the network interfaces of ranks, as far as they are set."""
    return {name: found[1] for name in SOCKET_INTERFACES if (found := _first(name))}


def shared_variables(options: Iterable[str]) -> dict[str, str]:
    """Return the variables of this process that ranks on other hosts get too.

    Args:
        options: the names of engine options. Their variables are not among them, as the plan has their values.
    """
    of_options = {option_variable(name) for name in options} | set(OPTION_ALIASES.values())
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(_SHARED_PREFIXES)
        and not name.startswith(_PER_PROCESS)
        and not name.endswith(_OF_ONE_HOST)
        and not any(word in name for word in _SECRETS)
        and name not in of_options
    }


def not_set_here(variables: dict[str, str]) -> dict[str, str]:
    """Return those of the variables that this process does not have itself."""
    return {name: value for name, value in variables.items() if name not in os.environ}


def cluster_key() -> str:
    """Return the secret that processes on different hosts share, or "" if there is none.

    It is the value of SHOAL_CLUSTER_KEY, or the content of the file that SHOAL_CLUSTER_KEY_FILE names.

    Raises:
        ConfigError: the file can't be read, is empty, or may be read by others; or both are set and differ.
    """
    found = os.environ.get("SHOAL_CLUSTER_KEY", "").strip()
    path = os.environ.get("SHOAL_CLUSTER_KEY_FILE", "").strip()
    if not path:
        return found
    key = _key_in(path)
    if found not in ("", key):
        raise ConfigError(f"SHOAL_CLUSTER_KEY differs from the key in SHOAL_CLUSTER_KEY_FILE={path}: unset one")
    return key


def _key_in(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            mode = os.fstat(file.fileno()).st_mode
            key = file.read(_MAX_KEY_CHARS).strip()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise ConfigError(f"SHOAL_CLUSTER_KEY_FILE={path} can't be read: {why}") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(
            f"SHOAL_CLUSTER_KEY_FILE={path} may be read by users other than its owner (mode {stat.S_IMODE(mode):o}): "
            "chmod 600 it"
        )
    if not key:
        raise ConfigError(f"SHOAL_CLUSTER_KEY_FILE={path} is empty: write a secret into it")
    return key


def visible_cuda_devices() -> str | None:
    return os.environ.get("CUDA_VISIBLE_DEVICES")


# The beginnings of variables that change how ranks compute and communicate. Hosts of one job should have the same.
_COMMUNICATION = (
    *("NCCL_", "RCCL_", "GLOO_", "UCX_", "FI_", "OMP_", "CUDA_", "HIP_", "ROCR_"),
    *("TORCH_NCCL_", "TORCH_DISTRIBUTED_", PREFIX, "VLLM_"),
)


def communication_variables() -> dict[str, str]:
    """Return the variables that change how ranks compute and communicate. Those with secrets are left out."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(_COMMUNICATION) and not any(word in name for word in _SECRETS)
    }


def ray_address() -> str:
    """Return RAY_ADDRESS, or "" if it is not set."""
    return os.environ.get("RAY_ADDRESS", "").strip()


def ray_gpus_per_rank() -> float | None:
    """Return VLLM_RAY_PER_WORKER_GPUS, which may be a part of a GPU, or None if it is not set.

    Raises:
        ConfigError: it is not a positive number.
    """
    _, text = _first(_RAY_GPUS) or ("", "")
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise ConfigError(f"{_RAY_GPUS} must be a number of GPUs above 0, got {text!r}")
    return number


def hub_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def cpu_kv_cache_bytes() -> int | None:
    """Return VLLM_CPU_KVCACHE_SPACE in bytes, or None if it is not set or 0.

    Raises:
        ConfigError: it is not a number of GiB.
    """
    _, text = _first(_CPU_KV_CACHE) or ("", "0")
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= _MAX_GIB:
        raise ConfigError(f"{_CPU_KV_CACHE} must be a number of GiB from 0 to {_MAX_GIB}, got {text!r}")
    return int(number * 2**30) or None


def child_environment(extra: dict[str, str]) -> dict[str, str]:
    """Return the environment of a child process: this process's without the API key, and with `extra`.

    The working directory, for which an empty entry stands too, is removed from PYTHONPATH (`import_path.safe_folders`).
    """
    folders = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    python_path = {"PYTHONPATH": os.pathsep.join(import_path.safe_folders(folders))}
    kept = {name: value for name, value in os.environ.items() if name not in API_KEY}
    return {**kept, **python_path, **extra}


def set_defaults(extra: dict[str, str]) -> None:
    """Set environment variables that the user has not set. Libraries read them when they load."""
    for name, value in extra.items():
        os.environ.setdefault(name, value)


def _first(*names: str | None) -> tuple[str, str] | None:
    return next(((name, text) for name in names if name and (text := os.environ.get(name, "").strip())), None)
