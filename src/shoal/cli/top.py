"""`shoal top`: what a server is doing, on the terminal."""

import click

from shoal import env
from shoal.cli.numbers import FloatRange
from shoal.lazy import load


@click.command()
@click.argument("url")
@click.option(
    "--interval",
    type=FloatRange(0.1, 3600),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="from one reading to the next",
)
@click.option("--once", is_flag=True, help="print what two readings say, and end; so it is where there is no terminal")
@click.option("--api-key", envvar=list(env.API_KEY), metavar="KEY", help="the server's key")
def top(url: str, interval: float, api_key: str | None, *, once: bool) -> None:
    """Show what the server at URL does, live.

    Replicas and their ranks, queue, KV use, prefix hits, tokens a second. q ends it.
    """
    load("shoal.client.top:run")(url, interval=interval, once=once, api_key=api_key)
