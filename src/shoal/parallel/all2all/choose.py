"""What the backends send, and which one a layout takes. Free of torch."""

import math
from dataclasses import dataclass

from shoal.values import format_bytes

_WORTHWHILE = 0.75  # of the bytes; between processes of one host both take about as long then


@dataclass(frozen=True, slots=True)
class Exchange:
    """A layer's experts on the ranks of several replicas. `held`: how many of them each rank holds."""

    held: tuple[int, ...]
    top_k: int  # experts of a token
    hidden: int
    item_bytes: int  # of an activation
    tp: int = 1  # ranks of a replica's stage

    @property
    def ranks(self) -> int:
        return len(self.held)

    @property
    def row_bytes(self) -> int:
        """Of a token's hidden state."""
        return self.hidden * self.item_bytes

    @property
    def routing_bytes(self) -> int:
        """Of its experts' numbers and weights, which go with it."""
        return 8 * self.top_k

    @property
    def remote_ranks(self) -> float:
        """Other ranks that hold one of a token's experts: expected, with every choice of experts equally likely and the
        token on any rank."""
        experts = sum(self.held)
        choices = math.comb(experts, self.top_k)
        reached = sum(1 - math.comb(experts - held, self.top_k) / choices for held in self.held)
        return reached * (1 - 1 / self.ranks)


def bytes_per_token(exchange: Exchange) -> dict[str, float]:
    """What all ranks together send for one token in one layer, by backend: to its experts, back, and the sum to the
    replica's other ranks. Ahead of a layer's tokens `all_to_all` sends 8 bytes more from each rank to each other."""
    there_and_back = 2 * exchange.row_bytes + exchange.routing_bytes
    to_own_replica = (exchange.tp - 1) * exchange.row_bytes
    return {
        "allgather_reducescatter": (exchange.ranks - 1) * there_and_back + to_own_replica,
        "all_to_all": exchange.remote_ranks * there_and_back + to_own_replica,
    }


def choose(exchange: Exchange) -> tuple[str, str]:
    """The backend for a layout, and why, in one line.

    Sending each token only where it has to go is worth it where that is clearly less: counts go first, so that every
    layer waits for other ranks once more.
    """
    sent = bytes_per_token(exchange)
    everywhere, needed = sent["allgather_reducescatter"], sent["all_to_all"]
    found = "all_to_all" if needed <= _WORTHWHILE * everywhere else "allgather_reducescatter"
    others = "1 other rank" if exchange.ranks == 2 else f"{exchange.ranks - 1} other ranks"
    reached = f"{exchange.top_k} experts of a token are on {exchange.remote_ranks:.1f} of {others}"
    sizes = f"{format_bytes(needed)} a token and layer where they are needed, {format_bytes(everywhere)} everywhere"
    return found, f"{reached}: {sizes}"
