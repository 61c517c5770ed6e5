"""The choice of the backend that takes tokens to experts on ranks of other replicas."""

from shoal.models.manifest import ITEM_BYTES
from shoal.parallel.all2all.choice import ExpertExchange, choose_backend
from shoal.parallel.expert_placement import place_experts


def choose_all2all(
    *, experts: int, top_k: int, hidden_size: int, dtype: str, ranks: int, tp: int = 1
) -> tuple[str, str]:
    """Return the backend that `--all2all-backend auto` stands for, and the reason.

    Args:
        experts: the number of experts of a layer, which lie on `ranks` ranks of all replicas together.
        top_k: how many experts each token is sent to.
        tp: how many of the ranks belong to one replica.
    """
    held = tuple(map(len, place_experts(experts, ranks, "linear")))  # the counts are the same for every strategy
    return choose_backend(ExpertExchange(held, top_k, hidden_size, ITEM_BYTES[dtype], tp))
