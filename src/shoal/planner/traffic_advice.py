"""What the log says about the traffic between hosts, and the layout that would have less of it."""

from collections.abc import Sequence

from shoal.models.spec import ModelSpec
from shoal.planner.host_order import order_hosts
from shoal.planner.host_traffic import MeasuredStep, host_exchanges, host_traffic, shown_time
from shoal.values import numbered
from shoal.wire.base import Ids


def describe_traffic(
    spec: ModelSpec,
    dtype: str,
    tp: int,
    stages: Ids,
    placed: Sequence[Ids],
    reasons: list[str],
    warnings: list[str],
    step: MeasuredStep | None = None,
) -> None:
    """Append to the reasons what crosses hosts, and to the warnings a layout of as many ranks with less of it.

    Args:
        step: the measured links; None: nothing was measured, so the number of exchanges decides.
    """
    found = host_traffic(spec, dtype, tp, stages, placed)
    took = None if step is None else step.seconds(host_exchanges(tp, stages, placed))
    reasons.append(f"between hosts: {found}{_timed(took, step)}")
    world, hosts = tp * len(stages), len(placed)
    pp = len(stages) * hosts
    if found.exchanges <= len(stages) or world % pp or pp > spec.num_layers:
        return
    # One stage and more on each host, so that no tensor-parallel group crosses hosts.
    per_stage = tuple(spec.num_layers // pp + (i < spec.num_layers % pp) for i in range(pp))
    share = world // hosts
    other_placed = [tuple(range(i * share, (i + 1) * share)) for i in range(hosts)]
    other = host_traffic(spec, dtype, world // pp, per_stage, other_placed)
    advice = f"--tensor-parallel-size {world // pp} --pipeline-parallel-size {pp}"
    if step is None or took is None:
        warnings.append(
            f"tensor-parallel groups cross hosts: {found}; with {advice} it would be {other}, which is faster on all "
            "but the fastest networks"
        )
        return
    exchanges = host_exchanges(world // pp, per_stage, other_placed)
    would_take = step.seconds(exchanges, order_hosts(exchanges, [share] * hosts, [share] * hosts, step))
    if would_take < took:
        warnings.append(
            f"tensor-parallel groups cross hosts: {found}{_timed(took, step)}; with {advice} it would be "
            f"{other}{_timed(would_take, step)}"
        )


def _timed(seconds: float | None, step: MeasuredStep | None) -> str:
    if seconds is None or step is None:
        return ""
    return f", about {shown_time(seconds)} for {numbered(step.tokens, 'token')} on the measured links"
