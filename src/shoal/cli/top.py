"""`shoal top`: the state of a server, live on the terminal."""

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
    help="time between readings",
)
@click.option("--once", is_flag=True, help="print the state once and end; so it always is without a terminal")
@click.option("--api-key", envvar=list(env.API_KEY), metavar="KEY", help="key of the server")
def top(url: str, interval: float, api_key: str | None, *, once: bool) -> None:
    """Show the state of the server at URL, live.

    It shows replicas and their ranks, the queue, KV cache use, prefix cache hits and tokens per second. Press q to end.
    """
    load("shoal.client.top:show_status")(url, interval=interval, once=once, api_key=api_key)
