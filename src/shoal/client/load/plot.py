"""A plot of a run: latencies over time and as distributions, throughput, and running requests."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shoal.client.load.outcome import LoadOutcome
from shoal.errors import ConfigError, UserError
from shoal.lazy import load

FORMATS = ("svg", "png", "pdf")


def check_plot(path: Path) -> None:
    """Check that a plot can be drawn.

    Raises:
        ConfigError: the file name has another suffix, or matplotlib is missing.
    """
    if path.suffix[1:].lower() not in FORMATS:
        raise ConfigError(f"--plot {path} must end with .svg, .png or .pdf")
    _figure()


def _figure() -> Any:
    try:
        return load("matplotlib.figure:Figure")
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib, or leave out --plot") from None


def plot(
    path: Path,
    outcomes: Sequence[LoadOutcome],
    chunks_by_second: Mapping[int, int],
    *,
    duration: float,
    slo: Mapping[str, float],
    title: str,
) -> None:
    """Draw the plot of a run.

    `chunks_by_second`: chunks that came in each second of the run.

    Raises:
        UserError: the file can't be written.
    """
    figure = _figure()(figsize=(11, 7), layout="constrained")
    figure.suptitle(title)
    over_time, distribution, rate, concurrency = figure.subplots(2, 2).flat
    _draw_latencies(over_time, outcomes)
    _draw_distributions(distribution, outcomes, slo)
    _draw_rate(rate, outcomes, chunks_by_second, duration)
    _draw_concurrency(concurrency, outcomes)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"--plot {path} can't be written: {error.strerror}") from None


def _draw_latencies(axes: Any, outcomes: Sequence[LoadOutcome]) -> None:
    for name in ("e2e", "ttft"):
        points = [(each.arrival, getattr(each, name)) for each in outcomes if each.ok]
        points = [(at, value) for at, value in points if value is not None]
        axes.plot([at for at, _ in points], [value for _, value in points], ".", markersize=3, label=name)
    failed = [(each.arrival, each.e2e) for each in outcomes if not each.ok]
    if failed:
        axes.plot([at for at, _ in failed], [value for _, value in failed], "rx", label="failed")
    axes.set(xlabel="arrival, s", ylabel="latency, s", ylim=(0, None))
    axes.legend()


def _draw_distributions(axes: Any, outcomes: Sequence[LoadOutcome], slo: Mapping[str, float]) -> None:
    for name in ("ttft", "tpot", "e2e"):
        values = sorted(value * 1e3 for each in outcomes if each.ok and (value := getattr(each, name)) is not None)
        shares = [(number + 1) / len(values) for number in range(len(values))]
        (line,) = axes.step(values, shares, where="post", label=name)
        if name in slo:
            axes.axvline(slo[name], color=line.get_color(), linestyle=":")
    axes.set(xlabel="ms", ylabel="share of requests within", xscale="log", ylim=(0, 1))
    axes.legend()


def _draw_rate(
    axes: Any, outcomes: Sequence[LoadOutcome], chunks_by_second: Mapping[int, int], duration: float
) -> None:
    """Draw output tokens per second. Each chunk counts as the mean number of tokens in a chunk."""
    chunks = sum(len(each.gaps) + 1 for each in outcomes if each.ok and each.first is not None)
    tokens = sum(each.output_tokens for each in outcomes if each.ok)
    seconds = range(int(duration) + 1)
    widths = [min(1.0, max(duration - second, 1e-3)) for second in seconds]
    rates = [
        chunks_by_second.get(second, 0) * tokens / max(chunks, 1) / width
        for second, width in zip(seconds, widths, strict=True)
    ]
    axes.bar(seconds, rates, width=widths, align="edge")
    axes.set(xlabel="s", ylabel="output tokens/s")


def _draw_concurrency(axes: Any, outcomes: Sequence[LoadOutcome]) -> None:
    changes = sorted([(each.sent, 1) for each in outcomes] + [(each.ended, -1) for each in outcomes])
    counts, running = [], 0
    for _, change in changes:
        running += change
        counts.append(running)
    axes.step([at for at, _ in changes], counts, where="post")
    axes.set(xlabel="s", ylabel="running requests", ylim=(0, None))
