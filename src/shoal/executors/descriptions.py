"""Lines for the log about the ranks of a replica."""

from shoal.values import format_bytes
from shoal.wire.ranks import LoadInfo, RankSetup


def describe_load(setup: RankSetup, info: LoadInfo) -> str:
    """Return a line for the log: the place of a rank in the layout, and what it holds."""
    layout = setup.plan.layout
    stage, tp_rank = divmod(setup.rank, layout.tp)
    experts = f"{info.experts} experts, " if info.experts else ""
    return (
        f"rank {setup.rank}: stage {stage} of {layout.num_stages}, tp {tp_rank} of {layout.tp}, layers "
        f"{info.first_layer}-{info.first_layer + info.layers - 1}, {info.q_heads} query and {info.kv_heads} KV heads, "
        f"{experts}{format_bytes(info.weight_bytes)} of weights on {info.device}"
    )


def describe_compute(setup: RankSetup, info: LoadInfo) -> str:
    """Return a line for the debug log: how a rank computes."""
    ways = f", {info.comm}" if info.comm else ""
    return (
        f"rank {setup.rank}: {setup.rank_plan.cost_share:.1%} of the cost, {info.threads} threads, {info.linear}, "
        f"{info.kernels}{ways}"
    )
