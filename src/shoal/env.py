"""The one place that reads environment variables."""

import os


def log_level() -> str:
    """SHOAL_LOG_LEVEL: debug, info, warning or error."""
    return os.environ.get("SHOAL_LOG_LEVEL", "info").upper()


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
