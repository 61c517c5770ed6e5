"""`shoal scale`: change the number of replicas while the server goes on."""

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
    help="time that it may take until all replicas are ready",
)
@click.option("--api-key", envvar=list(env.API_KEY), metavar="KEY", help="key of the server")
def scale(url: str, replicas: int, timeout: float, api_key: str | None) -> None:
    """Change the number of replicas of the server at URL to REPLICAS.

    Wait until they are ready, and print what happens. Requests go on meanwhile.
    """
    asyncio.run(
        load("shoal.client.scale:scale_server")(url, replicas, tell=click.echo, timeout=timeout, api_key=api_key)
    )
