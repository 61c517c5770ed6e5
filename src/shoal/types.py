"""What users pass in and get back, and what the machine has. Free of torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

from shoal.errors import RequestError

FinishReason = Literal["stop", "length", "abort"]


class PromptDict(TypedDict, total=False):
    """Either of the two."""

    prompt: str
    prompt_token_ids: Sequence[int]


Prompt = str | PromptDict


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens. Names and meanings follow vLLM.

    Raises:
        RequestError: a value is out of its range; the message names the parameter and the range.
    """

    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1: all tokens
    seed: int | None = None  # None or -1: the engine's own, different for every request
    max_tokens: int | None = 16  # None: as many as the model's length allows
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None  # how many of the likeliest tokens to report beside the chosen one

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature)
        _check_number("top_p", self.top_p)
        _check_integer("top_k", self.top_k)
        for name in ("seed", "max_tokens", "logprobs"):
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name))
        if self.temperature < 0:
            raise RequestError(f"temperature must be at least 0, got {self.temperature}; 0 is greedy")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p must be in (0, 1], got {self.top_p}; 1 keeps every token")
        if self.top_k < -1:
            raise RequestError(f"top_k must be at least 1, or 0 or -1 for all tokens, got {self.top_k}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise RequestError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if self.logprobs is not None and self.logprobs < 0:
            raise RequestError(f"logprobs must be at least 0, got {self.logprobs}")
        if self.seed == -1:
            object.__setattr__(self, "seed", None)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for token in self.stop_token_ids:
            _check_integer("stop_token_ids", token)


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RequestError(f"{name} must be a finite number, got {value!r}")


def _check_integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} must be an integer, got {value!r}")


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    cumulative_logprob: float | None = None
    logprobs: tuple[Mapping[int, float], ...] | None = None  # one mapping a token: token id -> log-probability


@dataclass(frozen=True, slots=True)
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    num_cached_tokens: int = 0
    error: str | None = None  # why the request has no complete output
    finished: bool = True


@dataclass(frozen=True, slots=True)
class Hardware:
    """What a host offers. Memory in bytes; `device_memory` is one device's, None where it can't be known yet."""

    device: Literal["cpu", "cuda"]
    num_devices: int
    cores: tuple[int, ...]
    host_memory: int
    host_memory_available: int
    device_memory: int | None
    devices_shareable: bool  # may several ranks use one device?
