"""Measuring how tokens are sent to experts on other ranks and back. Ranks are processes of this host."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from shoal.bench.rank_processes import measure_on_ranks
from shoal.errors import ConfigError
from shoal.planner.all2all import choose_all2all


@dataclass(frozen=True, slots=True)
class ExpertTraffic:
    """Sizes of an exchange between `ranks` replicas of one rank each, which share the experts of a layer.

    `tokens`: the numbers of tokens on each rank, which are measured one after the other.

    Raises:
        ConfigError: `top_k` is more than `experts`.
    """

    ranks: int
    experts: int
    top_k: int
    hidden_size: int
    dtype: str
    tokens: tuple[int, ...]
    repeat: int

    def __post_init__(self) -> None:
        if self.top_k > self.experts:
            raise ConfigError(
                f"--top-k {self.top_k} is more than --experts {self.experts}: lower --top-k or raise --experts"
            )

    def choose(self) -> tuple[str, str]:
        """Return the backend that `--all2all-backend auto` chooses, and the reason."""
        sizes = {"experts": self.experts, "top_k": self.top_k, "hidden_size": self.hidden_size}
        return choose_all2all(**sizes, dtype=self.dtype, ranks=self.ranks)


def measure_experts(traffic: ExpertTraffic) -> list[dict[str, Any]]:
    """Measure a layer's dispatch and combine for each number of tokens and each backend.

    The results have `us` (microseconds, the median of the slowest rank) and `sent_bytes` (bytes that a rank sends, the
    mean over ranks).

    Raises:
        RankFailed, EngineError: as `measure_on_ranks`.
    """
    return _summary(measure_on_ranks("experts", traffic.ranks, asdict(traffic)))


def _summary(answers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    groups: dict[tuple[int, str], list[Mapping[str, Any]]] = defaultdict(list)
    for answer in answers:
        groups[answer["tokens"], answer["backend"]].append(answer)
    return [
        {
            "tokens": tokens,
            "backend": backend,
            "us": max(answer["us"] for answer in group),
            "sent_bytes": statistics.mean(answer["sent_bytes"] for answer in group),
        }
        for (tokens, backend), group in groups.items()
    ]
