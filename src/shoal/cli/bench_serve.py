"""`shoal bench serve`: put load on a server and measure its answers."""

import json
import math
from pathlib import Path
from typing import Any

import click

from shoal import env
from shoal.cli.interrupts import Interrupted
from shoal.cli.numbers import AnyFloatRange, FloatRange, Integer, IntRange
from shoal.client.load.report import LIMITS, format_table
from shoal.client.load.settings import LoadSettings
from shoal.client.load.workload import Lengths, parse_mix
from shoal.errors import ConfigError
from shoal.lazy import load
from shoal.values import decimal_number

_FILE = click.Path(dir_okay=False, path_type=Path)
_COUNT = IntRange(1)
_POSITIVE = AnyFloatRange(0, min_open=True)


@click.command()
@click.argument("url")
@click.option(
    "--endpoint",
    type=click.Choice(["completions", "chat"]),
    default="completions",
    show_default=True,
    help="endpoint that requests are sent to",
)
@click.option("--model", metavar="NAME", help="name of the model on the server  [default: the first that it lists]")
@click.option("--api-key", envvar=list(env.API_KEY), metavar="KEY", help="key of the server")
@click.option(
    "--num-prompts", type=_COUNT, help="number of requests  [default: 100, or as many as start within --duration]"
)
@click.option("--duration", type=_POSITIVE, metavar="SECONDS",
              help="time after which no request is sent; running ones are still awaited")  # fmt: skip
@click.option(
    "--request-rate", type=_POSITIVE, metavar="RATE|inf", help="requests per second, sent without waiting for answers"
)
@click.option(
    "--burstiness",
    type=_POSITIVE,
    default=1.0,
    show_default=True,
    help="1: arrivals are a Poisson process; below 1: they come in bursts",
)
@click.option(
    "--max-concurrency", type=_COUNT, help="requests at the same time; without a rate, a new one follows each that ends"
)
@click.option("--random-input-len", type=_COUNT, metavar="TOKENS", help="length of a prompt  [default: 128]")
@click.option("--random-output-len", type=_COUNT, metavar="TOKENS", help="greatest length of an answer  [default: 64]")
@click.option("--random-range-ratio", type=FloatRange(0, 1, max_open=True), default=0.0, show_default=True,
              help="r: lengths are drawn from [length x (1 - r), length x (1 + r)]")  # fmt: skip
@click.option("--length-mix", metavar="IN:OUT@SHARE,...", help="several lengths, such as 128:64@0.7,1024:256@0.3")
@click.option("--shared-prefix-len", type=IntRange(0), default=0, show_default=True, metavar="TOKENS",
              help="length of a prefix that many prompts have in common")  # fmt: skip
@click.option("--num-prefixes", type=_COUNT, default=1, show_default=True, help="number of different prefixes")
@click.option("--prefix-zipf", type=FloatRange(0), default=1.0, show_default=True,
              help="s: the k-th prefix is as frequent as 1 / k^s")  # fmt: skip
@click.option("--token-ids", is_flag=True, help="send prompts as token ids, not as text")
@click.option(
    "--vocab-size", type=IntRange(8), default=256, show_default=True, help="upper limit of the token ids of --token-ids"
)
@click.option("--ignore-eos", is_flag=True, help="generate answers of full length")
@click.option("--temperature", type=FloatRange(0), default=0.0, show_default=True, help="0 is greedy")
@click.option("--seed", type=Integer(), default=0, show_default=True,
              help="seed of lengths, prompts and arrivals; another one gives other prompts")  # fmt: skip
@click.option(
    "--warmup", type=IntRange(0), default=0, show_default=True, help="requests that are sent first and not measured"
)
@click.option(
    "--timeout",
    type=_POSITIVE,
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="time that a request may take",
)
@click.option(
    "--slo",
    multiple=True,
    metavar="ttft:200",
    help="limit in ms of ttft, tpot or e2e; goodput counts requests within all limits",
)
@click.option(
    "--percentiles", default="50,90,99", show_default=True, metavar="P,...", help="percentiles of latencies to report"
)
@click.option(
    "--request-log-in", type=_FILE, metavar="FILE", help="replay the arrivals, lengths and prompts of this file"
)
@click.option("--request-log-out", type=_FILE, metavar="FILE", help="write a line of JSON for each request")
@click.option("--output", "-o", type=_FILE, metavar="FILE", help="write the report to this file, as JSON")
@click.option("--json", "as_json", is_flag=True, help="print JSON instead of a table")
@click.option("--plot", type=_FILE, metavar="FILE", help="draw the results: .svg, .png or .pdf; needs matplotlib")
def serve(as_json: bool, **flags: Any) -> int:
    """Put load on the server at URL, which serves the OpenAI API, and measure its answers.

    With --request-rate, requests are sent at their times without waiting for answers (open loop); with
    --max-concurrency, a new request follows each that ends (closed loop); with neither, all are sent at once. Latencies
    are counted from the time at which a request was due. The exit code is 1 if requests failed.
    """
    report = load("shoal.client.load.load_test:run_load_test")(_settings(flags))
    print(json.dumps(report, indent=2) if as_json else format_table(report))
    if report["interrupted"]:
        raise Interrupted("the report covers the requests that had ended")
    return 1 if report["requests"]["failed"] else 0


def _settings(flags: dict[str, Any]) -> LoadSettings:
    lengths = _lengths(flags.pop("length_mix"), flags.pop("random_input_len"), flags.pop("random_output_len"))
    range_ratio = flags.pop("random_range_ratio")
    slo = dict(_limit(text) for text in flags.pop("slo"))
    percentiles = [_percentile(text) for text in flags.pop("percentiles").split(",")]
    return LoadSettings(**flags, lengths=lengths, range_ratio=range_ratio, slo=slo, percentiles=percentiles)


def _lengths(mix: str | None, input_len: int | None, output_len: int | None) -> tuple[Lengths, ...]:
    if mix is None:
        return (Lengths(input_len or 128, output_len or 64),)
    if input_len is not None or output_len is not None:
        raise ConfigError("--length-mix sets all lengths: leave out --random-input-len and --random-output-len")
    return parse_mix(mix)


def _limit(text: str) -> tuple[str, float]:
    name, _, limit = text.partition(":")
    value = _number(limit)
    if name not in LIMITS or not 0 < value < math.inf:
        raise ConfigError(f"--slo {text!r} is not a limit; use the form NAME:MS, where NAME is {', '.join(LIMITS)}")
    return name, value


def _percentile(text: str) -> float:
    value = _number(text)
    if not 0 <= value <= 100:
        raise ConfigError(f"--percentiles has {text!r}, which is not between 0 and 100")
    return value


def _number(text: str) -> float:
    """Return the number in a text; NaN, which no limits contain, if there is none."""
    found = decimal_number(text.strip(" "))
    return math.nan if found is None else found
