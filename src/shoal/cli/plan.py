"""`shoal plan`: the plan that `shoal serve` or `shoal generate` would make with the same flags; it starts nothing."""

import json
import sys
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from shoal.cli.options import GroupedCommand, engine_values, serving_flags
from shoal.launch.deployment import Deployment, place_of
from shoal.launch.open_model import OpenModel, open_model
from shoal.values import format_bytes
from shoal.wire.base import as_json
from shoal.wire.plan import EnginePlan, RankPlan

_WIDTH = 140  # columns of a table that goes to a file or a pipe
_SECRETS = ("credentials",)  # fields of a plan that are not printed


@click.command(cls=GroupedCommand)
@click.argument("model", required=False)
@click.option("--json", "as_objects", is_flag=True, help="print the plans as JSON")
@serving_flags
def plan(model: str | None, as_objects: bool, **flags: Any) -> None:
    """Show how MODEL would be run on this host, and start nothing.

    The plan of each replica lists its ranks with their devices, layers, heads, experts and bytes. It also says how many
    KV blocks there are, how many requests of the greatest length they hold at a time, and why this was decided. With
    --nnodes, the other hosts are taken to be like this one; the plan also says what crosses hosts.
    """
    values = engine_values(flags)
    if values.get("nnodes"):
        values.setdefault("master_addr", "127.0.0.1")  # nothing listens there
    opened = open_model(model, values, online=True)
    plans = plans_of(opened)
    if as_objects:
        click.echo(json.dumps({"model": opened.name, "replicas": [_public(each) for each in plans]}, indent=2))
    else:
        _print(opened, plans)


def plans_of(model: OpenModel) -> list[EnginePlan]:
    """Return the plan of every replica of this host; of a front end without replicas, the one that it goes by.

    If each replica has several hosts, the plan of the first one is returned, for hosts that are all like this one.
    """
    if model.options.nodes.nnodes > 1:
        return [model.plan_over_equal_hosts()]
    local = Deployment.of(model.options).local
    return [model.plan_at(place_of(model.num_replicas, number, local)) for number in local] or [model.plan]


def _public(plan: EnginePlan) -> dict[str, Any]:
    found = as_json(plan)
    found["place"] = {name: value for name, value in found["place"].items() if name not in _SECRETS}
    return {**found, "num_blocks": plan.num_blocks}


def _print(model: OpenModel, plans: list[EnginePlan]) -> None:
    console = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)
    first, layout = plans[0], plans[0].layout
    console.print(
        f"{model.name}: tp {layout.tp} x pp {layout.num_stages} x dp {layout.replicas} = "
        f"{layout.num_ranks * layout.replicas} ranks, {first.dtype}, executor {first.executor}, "
        f"up to {first.max_model_len} tokens per request",
        soft_wrap=True,
    )
    console.print(_cache(first), soft_wrap=True)
    for each in plans:
        console.print(_table(each))
    for reason in first.reasons:
        console.print(f"- {reason}", soft_wrap=True, markup=False)
    for warning in first.warnings:
        console.print(f"warning: {warning}", soft_wrap=True, markup=False)


def _cache(plan: EnginePlan) -> str:
    if plan.num_blocks is None:
        return "KV cache: each rank measures the memory that is left on its device after loading"
    tokens = plan.num_blocks * plan.block_size
    return (
        f"KV cache: {plan.num_blocks} blocks x {plan.block_size} = {tokens} tokens per replica, "
        f"{tokens / plan.max_model_len:.1f} requests of {plan.max_model_len} tokens at a time"
    )


def _table(plan: EnginePlan) -> Table:
    table = Table(title=f"replica {plan.place.rank}", title_justify="left")
    headings = ["rank", "host", "device", "stage", "layers", "heads", "KV heads", "experts", "weights", "activations"]
    for heading in [*headings, "KV cache", "cost"]:
        table.add_column(heading, justify="left" if heading in ("host", "device") else "right")
    for rank in plan.ranks:
        table.add_row(*_row(rank))
    return table


def _device(rank: RankPlan) -> str:
    if rank.device == "cuda":
        return f"cuda:{rank.device_index}"
    node = "" if rank.numa_node is None else f" (NUMA node {rank.numa_node})"
    return f"cores {','.join(map(str, rank.cores))}{node}"


def _row(rank: RankPlan) -> list[str]:
    shard = rank.shard
    first, after = shard.layers
    experts = "shares" if shard.experts is None else str(len(shard.experts))
    return [
        str(rank.rank),
        rank.host,
        _device(rank),
        str(shard.stage),
        f"{first}-{after - 1}",
        str(shard.q_heads[1] - shard.q_heads[0]),
        str(shard.kv_heads[1] - shard.kv_heads[0]),
        experts if "EXPERT" in shard.columns else "",
        format_bytes(rank.weight_bytes),
        format_bytes(rank.activation_bytes),
        "measured" if rank.kv_budget is None else format_bytes(rank.kv_budget),
        f"{rank.cost_share:.1%}",
    ]
