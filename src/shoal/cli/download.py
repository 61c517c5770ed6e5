"""`shoal download`: a model of the hub onto this host, once; whatever runs it later needs no network."""

from pathlib import Path

import click

from shoal.cli.options import GroupedCommand
from shoal.launch import hub


@click.command(cls=GroupedCommand)
@click.argument("model")
@click.option("--revision", help="branch, tag or commit")
@click.option(
    "--dir", "directory", type=click.Path(path_type=Path), help="put plain files there, instead of into the hub's cache"
)
def download(model: str, revision: str | None, directory: Path | None) -> None:
    """Brings MODEL, an id on the Hugging Face hub, to this host, and prints the folder it is in.

    Afterwards `shoal generate` runs without a network, with the same id (and HF_HUB_OFFLINE=1) or with the folder. An
    interrupted download goes on where it was. HF_TOKEN opens models that are gated or private.
    """
    click.echo(hub.download(model, revision, directory))
