"""Which backend takes tokens to experts on other replicas' ranks."""

from shoal.models.manifest import ITEM_BYTES
from shoal.parallel.all2all.choose import Exchange, choose
from shoal.parallel.placement import place_experts


def choose_all2all(
    *, experts: int, top_k: int, hidden_size: int, dtype: str, ranks: int, tp: int = 1
) -> tuple[str, str]:
    """What `--all2all-backend auto` takes for `experts` on `ranks`, of which `tp` are one replica's, and why."""
    held = tuple(map(len, place_experts(experts, ranks, "linear")))  # as many as with any other strategy
    return choose(Exchange(held, top_k, hidden_size, ITEM_BYTES[dtype], tp))
