"""`shoal doctor`: checks of this host, or of several, before anything is served."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from shoal.cli.options import cluster_tls_flags
from shoal.config.engine_options import ClusterTlsOptions
from shoal.doctor import ray_run, runs
from shoal.doctor.report import print_report
from shoal.doctor.settings import MEETING_PORT, Settings
from shoal.errors import ConfigError
from shoal.wire.doctor import DoctorReport
from shoal.wire.topology import pretty_document

_WIDTH = 140  # columns of a table that goes to a file or a pipe
_TLS = tuple(each.name for each in dataclasses.fields(ClusterTlsOptions))
_OPTIONS = ("dtype", "max_model_len", "revision")  # of an engine, for the question whether the model fits


@click.command()
@click.argument("model", required=False)
@click.option("--json", "as_objects", is_flag=True, help="print findings and topology as JSON")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="write the measured topology as JSON: hosts, devices, links, speeds between hosts",
)
@click.option(
    "--ranks",
    type=click.IntRange(0, 64),
    help="processes that try an all-reduce; 0: none, which takes a second [default: one for each GPU, or 2]",
)
@click.option("--nnodes", type=click.IntRange(1), default=1, show_default=True, help="hosts that are checked together")
@click.option("--node-rank", type=click.IntRange(0), default=0, show_default=True, help="number of this host, from 0")
@click.option("--master-addr", metavar="ADDRESS", help="address of the host with --node-rank 0")
@click.option(
    "--master-port", type=click.IntRange(1, 65535), default=MEETING_PORT, show_default=True, help="a free port there"
)
@click.option(
    "--timeout", type=click.FloatRange(1), default=60.0, show_default=True, help="seconds to wait for other hosts"
)
@click.option("--ray", is_flag=True, help="check all nodes of a Ray cluster together")
@click.option(
    "--ray-address",
    metavar="ADDRESS",
    help="host:port of the Ray cluster [default: RAY_ADDRESS, or the cluster of this host]",
)
@cluster_tls_flags
@click.option("--dtype", help="type of the weights, for the question whether MODEL fits")
@click.option("--max-model-len", type=click.IntRange(1), help="context length, for the question whether MODEL fits")
@click.option("--revision", help="branch, tag or commit of MODEL on the hub")
def doctor(
    model: str | None,
    as_objects: bool,
    output: Path | None,
    ranks: int | None,
    nnodes: int,
    node_rank: int,
    master_addr: str | None,
    master_port: int,
    timeout: float,
    ray: bool,
    ray_address: str | None,
    **options: Any,
) -> int:
    """Check this host, or several hosts and the network between them, and say how to mend what is wrong.

    With MODEL it also says at which layouts the model fits on this host. For several hosts, run it on each of them at
    the same time, with the same --nnodes and --master-addr; for a Ray cluster, run it once with --ray. Every finding
    has the command that mends it. The exit code is 1 if there is a failure.
    """
    _check_hosts(nnodes, node_rank, master_addr)
    if ray and nnodes > 1:
        raise ConfigError(f"--ray examines all nodes of the cluster: leave out --nnodes {nnodes}")
    if ray_address is not None and not ray:
        raise ConfigError("--ray-address has no effect without --ray: give both, or leave it out")
    settings = Settings(
        model=model,
        options={name: options[name] for name in _OPTIONS if options[name] is not None},
        ranks=ranks,
        nnodes=nnodes,
        node_rank=node_rank,
        master=master_addr or "",
        master_port=master_port,
        tls=ClusterTlsOptions(**{name: options[name] for name in _TLS}),
        timeout_s=timeout,
    )
    report = ray_run.run(settings, ray_address) if ray else runs.run(settings)
    if output is not None:
        _write(report, output)
    if as_objects:
        click.echo(pretty_document(report))
    else:
        print_report(report, Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False))
    return 1 if report.failed else 0


def _check_hosts(nnodes: int, node_rank: int, master: str | None) -> None:
    if node_rank >= nnodes:
        raise ConfigError(f"--node-rank {node_rank} of --nnodes {nnodes} does not exist: the hosts count from 0")
    if nnodes > 1 and master is None:
        raise ConfigError(f"--nnodes {nnodes} needs --master-addr, the address of the host with --node-rank 0")
    if nnodes == 1 and master is not None:
        raise ConfigError("--master-addr has no effect on one host: give --nnodes too, or leave it out")


def _write(report: DoctorReport, output: Path) -> None:
    try:
        output.write_text(pretty_document(report.topology) + "\n", "utf-8")
    except OSError as error:
        raise ConfigError(f"--output {output} cannot be written: {error.strerror}; give another file") from None
