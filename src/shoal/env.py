"""The one place that reads environment variables."""

import os
from collections.abc import Iterable
from dataclasses import dataclass

from shoal.errors import ConfigError

PREFIX = "SHOAL_"
_LEVELS = ("debug", "info", "warning", "error", "critical")


@dataclass(frozen=True, slots=True)
class Variable:
    name: str
    help: str
    alias: str | None = None  # vLLM's name for the same; the one of ours wins


SETTINGS = (
    Variable("SHOAL_LOG_LEVEL", f"what the log on stderr holds: {', '.join(_LEVELS)}", "VLLM_LOGGING_LEVEL"),
    Variable("CUDA_VISIBLE_DEVICES", "the GPUs that count as this host's"),
    Variable("HF_HUB_OFFLINE", "1: nothing is fetched from the hub"),
    Variable("HF_TOKEN", "opens models on the hub that need a login"),
    Variable("HF_HOME", "where models from the hub are kept"),
)

# vLLM's variables that mean the same as one of our options. None of its others does.
OPTION_ALIASES = {
    "pipeline_layer_partition": "VLLM_PP_LAYER_PARTITION",
    "step_timeout": "VLLM_ENGINE_ITERATION_TIMEOUT_S",
    "start_timeout": "VLLM_ENGINE_READY_TIMEOUT_S",
    "engine_process": "VLLM_ENABLE_V1_MULTIPROCESSING",
}


def option_variable(name: str) -> str:
    """The variable of an engine option: `block_size` -> SHOAL_BLOCK_SIZE."""
    return PREFIX + name.upper()


def option(name: str) -> tuple[str, str] | None:
    """(variable, text) of an engine option, where it is set; an empty one counts as not set."""
    return _first(option_variable(name), OPTION_ALIASES.get(name))


def unread(options: Iterable[str]) -> list[str]:
    """The SHOAL_* variables that are set and that nobody reads."""
    known = {variable.name for variable in SETTINGS} | {option_variable(name) for name in options}
    return sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known)


def log_level() -> str:
    """SHOAL_LOG_LEVEL, in capitals.

    Raises:
        ConfigError: it is no level.
    """
    variable, level = _first("SHOAL_LOG_LEVEL", "VLLM_LOGGING_LEVEL") or ("", "info")
    if level.lower() not in _LEVELS:
        raise ConfigError(f"{variable} must be one of {', '.join(_LEVELS)}, got {level!r}")
    return level.upper()


def visible_cuda_devices() -> str | None:
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def hub_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def child_environment(extra: dict[str, str]) -> dict[str, str]:
    """The environment of a child process: this one's, with `extra` on top."""
    return {**os.environ, **extra}


def prefer(extra: dict[str, str]) -> None:
    """Sets variables that libraries read when they are loaded, where the user has not set them."""
    for name, value in extra.items():
        os.environ.setdefault(name, value)


def _first(*names: str | None) -> tuple[str, str] | None:
    return next(((name, text) for name in names if name and (text := os.environ.get(name, "").strip())), None)
