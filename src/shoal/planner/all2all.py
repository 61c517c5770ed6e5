"""The choice of the backend that takes tokens to experts on ranks of other replicas."""

from shoal.config.engine_options import EngineOptions
from shoal.models.manifest import ITEM_BYTES
from shoal.models.spec import ModelSpec
from shoal.parallel.all2all.choice import ExpertExchange, choose_backend
from shoal.parallel.expert_placement import place_experts
from shoal.wire.plan import Layout


def plan_all2all(options: EngineOptions, spec: ModelSpec, layout: Layout, dtype: str, reasons: list[str]) -> str:
    """Return the backend of a replica; "" if it shares no experts with others. Appends the choice to the reasons."""
    if spec.moe is None or not layout.shares_experts:
        return ""
    wanted = options.parallel.all2all_backend
    if wanted != "auto":
        return wanted
    found, why = choose_all2all(
        experts=spec.moe.num_experts,
        top_k=spec.moe.routing.top_k,
        hidden_size=spec.hidden_size,
        dtype=dtype,
        ranks=layout.replicas * layout.tp,
        tp=layout.tp,
    )
    reasons.append(f"all2all backend {found}: {why}")
    return found


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
