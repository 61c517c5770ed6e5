"""`shoal scale`: more or fewer replicas, while the server goes on."""

import asyncio

import click

from shoal import env
from shoal.cli.numbers import FloatRange, IntRange
from shoal.lazy import load


@click.command()
@click.argument("url")
@click.argument("replicas", type=IntRange(min=1))
@click.option(
    "--timeout",
    type=FloatRange(min=0),
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="how long it may take until all are ready",
)
@click.option("--api-key", envvar=list(env.API_KEY), metavar="KEY", help="the server's key")
def scale(url: str, replicas: int, timeout: float, api_key: str | None) -> None:
    """Have the server at URL run so many REPLICAS.

    Waits until they are ready, and tells what happens. Requests go on meanwhile.
    """
    asyncio.run(load("shoal.client.scale:scale")(url, replicas, tell=click.echo, timeout=timeout, api_key=api_key))
