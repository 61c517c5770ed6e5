"""`shoal bench comm`: what the exchange of tensors between ranks of this host takes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from shoal.bench.comm_operations import BACKENDS, OPERATIONS, OperationSizes, measure_operations
from shoal.bench.expert_exchange import ExpertTraffic, measure_experts
from shoal.cli.json_report import write_report
from shoal.cli.numbers import IntRange
from shoal.errors import ConfigError
from shoal.values import parse_bytes

# The flags that only one pattern has.
_FLAGS = {"operations": ("operation", "size", "backend"), "moe": ("experts", "top_k", "hidden_size", "tokens")}


@click.command()
@click.option(
    "--pattern",
    type=click.Choice(["operations", "moe"]),
    default="operations",
    show_default=True,
    help="operations: each operation alone; moe: how tokens are sent to experts on other ranks and back",
)
@click.option("--ranks", type=IntRange(2), default=2, show_default=True, help="processes, with a core each if possible")
@click.option(
    "--operation",
    type=click.Choice(OPERATIONS),
    multiple=True,
    default=OPERATIONS,
    show_default=True,
    help="operations: one to measure; may be given several times",
)
@click.option(
    "--size",
    multiple=True,
    default=("2KiB", "64KiB", "1MiB", "8MiB"),
    show_default=True,
    metavar="BYTES",
    help="operations: size of the largest tensor of a rank; may be given several times",
)
@click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    multiple=True,
    default=BACKENDS,
    show_default=True,
    help="operations: how tensors travel; may be given several times",
)
@click.option(
    "--experts", type=IntRange(1), default=64, show_default=True, help="moe: experts of a layer, over all ranks"
)
@click.option("--top-k", type=IntRange(1), default=8, show_default=True, help="moe: experts that each token uses")
@click.option("--hidden-size", type=IntRange(1), default=2048, show_default=True, help="moe: numbers per token")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="bfloat16",
    show_default=True,
    help="type of the numbers",
)
@click.option(
    "--tokens",
    type=IntRange(0),
    multiple=True,
    default=(1, 4, 16, 64, 256, 1024, 4096),
    show_default=True,
    help="moe: tokens on each rank; may be given several times",
)
@click.option("--repeat", type=IntRange(1), default=9, show_default=True, help="measured runs; the median is reported")
@click.option("--json", "as_json", is_flag=True, help="print JSON instead of a table")
@click.option("--output", "-o", type=click.Path(path_type=Path, dir_okay=False), help="write JSON to this file")
def comm(pattern: str, as_json: bool, output: Path | None, **flags: Any) -> None:
    """Measure the exchange of tensors between ranks of this host: the operations, or the way to experts and back."""
    _check_flags(pattern)
    own = {name: value for name, value in flags.items() if not any(name in names for names in _FLAGS.values())}
    own |= {name: flags[name] for name in _FLAGS[pattern]}
    measure, show = {"operations": (_operations, _print_operations), "moe": (_experts, _print_experts)}[pattern]
    report = {"benchmark": "comm", "pattern": pattern, **measure(**own)}
    if not as_json:
        show(report)
    if as_json or output is not None:
        write_report(report, output)


def _check_flags(pattern: str) -> None:
    """Check that no flag of another pattern is given.

    Raises:
        ConfigError: one is.
    """
    context = click.get_current_context()
    for other, names in _FLAGS.items():
        for name in names:
            if other != pattern and context.get_parameter_source(name) is not ParameterSource.DEFAULT:
                raise ConfigError(f"--{name.replace('_', '-')} is for --pattern {other}, and the pattern is {pattern}")


def _operations(
    *, ranks: int, operation: Sequence[str], size: Sequence[str], backend: Sequence[str], dtype: str, repeat: int
) -> dict[str, Any]:
    sizes = OperationSizes(
        ranks,
        tuple(dict.fromkeys(operation)),
        tuple(dict.fromkeys(parse_bytes(each, "--size") for each in size)),
        tuple(dict.fromkeys(backend)),
        dtype,
        repeat,
    )
    return {**{name: getattr(sizes, name) for name in OperationSizes.__slots__}, "results": measure_operations(sizes)}


def _experts(**sizes: Any) -> dict[str, Any]:
    traffic = ExpertTraffic(**sizes)
    chosen, why = traffic.choose()
    given = {name: getattr(traffic, name) for name in ExpertTraffic.__slots__}
    return {**given, "auto": chosen, "why": why, "results": measure_experts(traffic)}


def _print_operations(report: dict[str, Any]) -> None:
    """Print a line for each operation and size, with the backends side by side."""
    results = report["results"]
    backends = list(dict.fromkeys(result["backend"] for result in results))
    print(f"{'':24}" + "".join(f"{backend:>34}" for backend in backends))
    print(f"{'operation':14}{'bytes':>10}" + f"{'us':>12}{'GB/s':>11}{'bus GB/s':>11}" * len(backends))
    for operation, size in dict.fromkeys((result["operation"], result["bytes"]) for result in results):
        row = [result for result in results if (result["operation"], result["bytes"]) == (operation, size)]
        print(f"{operation:14}{size or '-':>10}" + "".join(map(_cell, row)))
    print("\nus: the slowest rank, median; GB/s: bytes / time; bus GB/s: of that, what each rank must send at least")


def _cell(result: dict[str, Any]) -> str:
    if not result["bytes"]:
        return f"{result['us']:>12.1f}{'-':>11}{'-':>11}"
    algorithm, bus = result["algorithm_bytes_per_s"] / 1e9, result["bus_bytes_per_s"] / 1e9
    return f"{result['us']:>12.1f}{algorithm:>11.2f}{bus:>11.2f}"


def _print_experts(report: dict[str, Any]) -> None:
    """Print a line for each number of tokens, with the backends side by side, and the choice of `auto`."""
    results = report["results"]
    backends = list(dict.fromkeys(result["backend"] for result in results))
    print(" " * 8 + "".join(f"{backend:>34}" for backend in backends))
    print(f"{'tokens':>8}" + f"{'us':>14}{'bytes per rank':>20}" * len(backends))
    for tokens in dict.fromkeys(result["tokens"] for result in results):
        row = [result for result in results if result["tokens"] == tokens]
        print(f"{tokens:>8}" + "".join(f"{each['us']:>14.0f}{each['sent_bytes']:>20.0f}" for each in row))
    print(f"\nauto chooses {report['auto']}: {report['why']}")
