"""`shoal download`: fetch a model from the hub once, so that it can be run without a network."""

from pathlib import Path

import click

from shoal.cli.options import GroupedCommand
from shoal.launch import hub


@click.command(cls=GroupedCommand)
@click.argument("model")
@click.option("--revision", help="branch, tag or commit of the model")
@click.option(
    "--dir", "directory", type=click.Path(path_type=Path), help="folder for the files, instead of the hub's cache"
)
def download(model: str, revision: str | None, directory: Path | None) -> None:
    """Download MODEL, an id on the Hugging Face hub, and print the folder it is in.

    Afterwards `shoal generate` needs no network, with the same id (and HF_HUB_OFFLINE=1) or with the folder. An
    interrupted download is resumed. Set HF_TOKEN for models that are gated or private.
    """
    click.echo(hub.download(model, revision, directory))
