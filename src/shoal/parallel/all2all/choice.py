"""The choice of a dispatch backend by the bytes that each would send. This module is free of torch."""

import math
from dataclasses import dataclass

from shoal.values import format_bytes

# `all_to_all` is chosen if it sends at most this part of the other backend's bytes. At this ratio both take about the
# same time between processes of one host.
_WORTHWHILE = 0.75


@dataclass(frozen=True, slots=True)
class ExpertExchange:
    """The sizes that decide how many bytes a layer's dispatch sends."""

    held: tuple[int, ...]  # how many experts each rank holds
    top_k: int  # experts per token
    hidden: int
    item_bytes: int  # bytes of one element of the hidden state
    tp: int = 1  # ranks of one stage of a replica

    @property
    def ranks(self) -> int:
        return len(self.held)

    @property
    def row_bytes(self) -> int:
        """The bytes of a token's hidden state."""
        return self.hidden * self.item_bytes

    @property
    def routing_bytes(self) -> int:
        """The bytes of a token's expert numbers and weights, which are sent with it."""
        return 8 * self.top_k

    @property
    def remote_ranks(self) -> float:
        """The expected number of other ranks that hold one of a token's experts.

        All choices of experts are taken as equally likely, and the token may be on any rank.
        """
        experts = sum(self.held)
        choices = math.comb(experts, self.top_k)
        reached = sum(1 - math.comb(experts - held, self.top_k) / choices for held in self.held)
        return reached * (1 - 1 / self.ranks)


def bytes_per_token(exchange: ExpertExchange) -> dict[str, float]:
    """Return, by backend, the bytes that all ranks together send for one token in one layer.

    They are the token to its experts, the results back, and the sum to the replica's other ranks. `all_to_all` also
    sends counts, 8 bytes from each rank to each other rank per layer, which are not included.
    """
    there_and_back = 2 * exchange.row_bytes + exchange.routing_bytes
    to_own_replica = (exchange.tp - 1) * exchange.row_bytes
    return {
        "allgather_reducescatter": (exchange.ranks - 1) * there_and_back + to_own_replica,
        "all_to_all": exchange.remote_ranks * there_and_back + to_own_replica,
    }


def choose_backend(exchange: ExpertExchange) -> tuple[str, str]:
    """Return the backend for a layout, and the reason in one line.

    `all_to_all` must send clearly fewer bytes to be chosen, because it also exchanges counts: one more wait a layer.
    """
    sent = bytes_per_token(exchange)
    everywhere, needed = sent["allgather_reducescatter"], sent["all_to_all"]
    found = "all_to_all" if needed <= _WORTHWHILE * everywhere else "allgather_reducescatter"
    others = "1 other rank" if exchange.ranks == 2 else f"{exchange.ranks - 1} other ranks"
    reached = f"{exchange.top_k} experts of a token are on {exchange.remote_ranks:.1f} of {others}"
    sizes = f"{format_bytes(needed)} a token and layer where they are needed, {format_bytes(everywhere)} everywhere"
    return found, f"{reached}: {sizes}"
