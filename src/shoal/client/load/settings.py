"""The settings of a load test."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shoal.client.load.workload import Lengths
from shoal.errors import ConfigError

DEFAULT_NUM_PROMPTS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSettings:
    """The options of `shoal bench serve`. Lengths are in tokens, times in seconds, limits of `slo` in ms.

    `request_rate` None: the arrivals of the replayed log; without a log, all requests arrive at once.

    Raises:
        ConfigError: options contradict each other or have no usable value.
    """

    url: str
    endpoint: str = "completions"
    model: str | None = None
    api_key: str | None = None
    num_prompts: int | None = None
    request_rate: float | None = None
    burstiness: float = 1.0
    max_concurrency: int | None = None
    duration: float | None = None
    lengths: Sequence[Lengths] = (Lengths(128, 64),)
    range_ratio: float = 0.0
    shared_prefix_len: int = 0
    num_prefixes: int = 1
    prefix_zipf: float = 1.0
    token_ids: bool = False
    vocab_size: int = 256
    ignore_eos: bool = False
    temperature: float = 0.0
    seed: int = 0
    slo: Mapping[str, float] = field(default_factory=dict)
    percentiles: Sequence[float] = (50.0, 90.0, 99.0)
    timeout: float = 600.0
    warmup: int = 0
    request_log_in: Path | None = None
    request_log_out: Path | None = None
    output: Path | None = None
    plot: Path | None = None

    def __post_init__(self) -> None:
        for name in ("burstiness", "duration", "prefix_zipf", "temperature", "timeout"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ConfigError(f"--{name.replace('_', '-')} {value} must be a finite number")
        if self.request_rate is not None and math.isnan(self.request_rate):
            raise ConfigError("--request-rate nan is not a rate")
        if self.token_ids and self.chat:
            raise ConfigError("--token-ids needs --endpoint completions, since a chat has no token ids")
        if self.burst and self.count is None and self.request_log_in is None:
            raise ConfigError(
                "--duration alone would send requests without end, all at once: add --request-rate, --max-concurrency"
                " or --num-prompts"
            )

    @property
    def chat(self) -> bool:
        return self.endpoint == "chat"

    @property
    def count(self) -> int | None:
        """The most requests; None: as many as start within the duration, or as the log has."""
        if self.num_prompts is None and self.duration is None and self.request_log_in is None:
            return DEFAULT_NUM_PROMPTS
        return self.num_prompts

    @property
    def paced(self) -> bool:
        """Return whether requests have times of arrival, drawn or from the log."""
        rate = self.request_rate
        return self.request_log_in is not None if rate is None else not math.isinf(rate)

    @property
    def burst(self) -> bool:
        return not self.paced and self.max_concurrency is None
