"""The report of a run, as JSON and as a table."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shoal.client.load.outcome import LoadOutcome

_ROWS = {
    "ttft_ms": "time to first token, ms",
    "tpot_ms": "time per token, ms",
    "itl_ms": "between chunks, ms",
    "e2e_ms": "end to end, ms",
    "late_ms": "sent late by, ms",
}
LIMITS = ("ttft", "tpot", "e2e")


def make_report(
    outcomes: Sequence[LoadOutcome],
    duration: float,
    *,
    percentiles: Sequence[float],
    slo: Mapping[str, float],
    peak: int,
    broken_off: int,
) -> dict[str, Any]:
    """Return the report of a run of `duration` seconds.

    Latencies and tokens are those of requests that succeeded. Rates are over the whole `duration`.

    Args:
        slo: limits in ms for `ttft`, `tpot` and `e2e`; requests that succeed within all of them count as goodput.
        peak: the most requests that ran at the same time.
        broken_off: requests without an outcome, since the run was interrupted.
    """
    fine = [each for each in outcomes if each.ok]
    input_tokens = sum(each.prompt_tokens for each in fine)
    output_tokens = sum(each.output_tokens for each in fine)
    seconds = max(duration, 1e-9)
    report = {
        "duration_s": duration,
        "requests": {"ok": len(fine), "failed": len(outcomes) - len(fine), "broken_off": broken_off},
        "errors": _errors(outcomes),
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "tokens_counted_by": "server" if all(each.counted for each in fine) else "chunks",
        "requests_per_s": len(fine) / seconds,
        "input_tokens_per_s": input_tokens / seconds,
        "output_tokens_per_s": output_tokens / seconds,
        "peak_concurrency": peak,
        "ttft_ms": summarize_ms((each.ttft for each in fine), percentiles),
        "tpot_ms": summarize_ms((each.tpot for each in fine), percentiles),
        "itl_ms": summarize_ms((gap for each in fine for gap in each.gaps), percentiles),
        "e2e_ms": summarize_ms((each.e2e for each in fine), percentiles),
        "late_ms": summarize_ms((each.late for each in outcomes), percentiles),
    }
    if slo:
        good = sum(is_good(each, slo) for each in fine)
        share = good / len(outcomes) if outcomes else 0.0
        report["goodput"] = {"slo_ms": dict(slo), "requests_per_s": good / seconds, "share": share}
    return report


def is_good(outcome: LoadOutcome, slo: Mapping[str, float]) -> bool:
    """Return whether a request succeeded within all limits.

    A latency that it does not have (the time per token of one token) is within any limit.
    """
    if not outcome.ok:
        return False
    latencies = {name: getattr(outcome, name) for name in LIMITS}
    return all(latencies[name] is None or latencies[name] * 1e3 <= limit for name, limit in slo.items())


def summarize_ms(seconds: Iterable[float | None], percentiles: Sequence[float]) -> dict[str, float] | None:
    """Return mean, percentiles and maximum in ms; None if there is no value."""
    values = sorted(value * 1e3 for value in seconds if value is not None)
    if not values:
        return None
    return {
        "mean": math.fsum(values) / len(values),
        **{f"p{percentile:g}": quantile(values, percentile / 100) for percentile in percentiles},
        "max": values[-1],
    }


def quantile(ordered: Sequence[float], share: float) -> float:
    """Return a quantile, interpolated linearly between neighbours (Hyndman and Fan 1996, type 7)."""
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def _errors(outcomes: Iterable[LoadOutcome]) -> dict[str, dict[str, Any]]:
    """Return the number of failures of each kind, with the message of the first one."""
    failures = [each.failure for each in outcomes if each.failure is not None]
    counts = Counter(failure.kind for failure in failures)
    return {
        kind: {"count": count, "example": next(failure.message for failure in failures if failure.kind == kind)}
        for kind, count in counts.most_common()
    }


def format_table(report: dict[str, Any]) -> str:
    requests = report["requests"]
    broken_off = f", {requests['broken_off']} broken off" if requests["broken_off"] else ""
    lines = [
        f"{requests['ok']} requests ok, {requests['failed']} failed{broken_off} in {report['duration_s']:.2f} s,"
        f" at most {report['peak_concurrency']} at once",
        f"{report['requests_per_s']:.2f} requests/s, {report['input_tokens_per_s']:,.1f} tokens/s in,"
        f" {report['output_tokens_per_s']:,.1f} tokens/s out",
    ]
    if report["tokens_counted_by"] == "chunks":
        lines.append("the server does not say how many tokens it sent, so chunks are counted")
    if "goodput" in report:
        limits = ", ".join(f"{name} {limit:g} ms" for name, limit in report["goodput"]["slo_ms"].items())
        good = report["goodput"]
        lines.append(f"goodput {good['requests_per_s']:.2f} requests/s, {good['share']:.1%} within {limits}")
    columns = next((list(report[name]) for name in _ROWS if report[name]), [])
    if columns:
        lines += ["", " " * 26 + "".join(f"{column:>11}" for column in columns)]
    for name, title in _ROWS.items():
        if report[name]:
            lines.append(f"{title:<26}" + "".join(f"{report[name][column]:>11.2f}" for column in columns))
    for kind, error in report["errors"].items():
        lines.append(f"{error['count']} x {kind}: {error['example']}")
    return "\n".join(lines)
