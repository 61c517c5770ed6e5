"""The report and the plot of a run."""

import json
import statistics
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.client.load.outcome import Failure, LoadOutcome
from shoal.client.load.plot import check_plot, plot
from shoal.client.load.report import format_table, is_good, make_report, quantile, summarize_ms
from shoal.client.load.workload import PlannedRequest
from shoal.errors import ConfigError
from support.fakes import steady

PLANNED = PlannedRequest(0, 0.0, "a", 1, 5)


def outcome(arrival: float = 1.0, *, failure: Failure | None = None, tokens: int = 5) -> LoadOutcome:
    """Return an outcome with the first token after 0.5 s, the others every 0.1 s, and the end 0.1 s after the last."""
    last = arrival + 0.5 + 0.1 * (tokens - 1)
    return LoadOutcome(
        PLANNED,
        arrival,
        sent=arrival + 0.2,
        ended=last + 0.1,
        first=arrival + 0.5,
        last=last,
        prompt_tokens=10,
        output_tokens=tokens,
        counted=True,
        gaps=[0.1] * (tokens - 1),
        failure=failure,
    )


def test_tokens_without_text_count_in_the_time_per_token() -> None:
    """Of 65 tokens only the first 11 had text. The finish reason came with the last token."""
    seen = {"first": 1.0, "last": 2.0, "prompt_tokens": 9, "output_tokens": 65}
    found = LoadOutcome(PLANNED, 0.0, sent=0.0, ended=7.5, stopped=7.4, **seen)  # type: ignore[arg-type]
    assert found.tpot == pytest.approx(0.1)
    assert (
        LoadOutcome(PLANNED, 0.0, sent=0.0, ended=1.0, first=1.0, last=1.0, stopped=1.0, output_tokens=65).tpot is None
    )


def test_report() -> None:
    fine = [outcome(1.0), outcome(2.0, tokens=1)]
    failed = [outcome(failure=Failure("HTTP 500", "first")), outcome(failure=Failure("HTTP 500", "second"))]
    report = make_report(
        [*fine, *failed], 4.0, percentiles=[50, 99.5], slo={"ttft": 600, "e2e": 700}, peak=3, broken_off=1
    )
    assert report["requests"] == {"ok": 2, "failed": 2, "broken_off": 1}
    assert report["errors"] == {"HTTP 500": {"count": 2, "example": "first"}}
    assert (report["requests_per_s"], report["input_tokens_per_s"], report["output_tokens_per_s"]) == (0.5, 5.0, 1.5)
    assert list(report["ttft_ms"]) == ["mean", "p50", "p99.5", "max"]
    assert report["ttft_ms"]["mean"] == pytest.approx(500)
    assert report["tpot_ms"]["max"] == pytest.approx(100)
    assert report["e2e_ms"]["mean"] == pytest.approx((1000 + 600) / 2)
    assert report["late_ms"]["p50"] == pytest.approx(200)
    assert report["goodput"]["requests_per_s"] == 0.25
    assert report["goodput"]["share"] == 0.25
    text = format_table(report)
    assert "2 requests ok, 2 failed, 1 broken off in 4.00 s, at most 3 at once" in text
    assert "goodput 0.25 requests/s, 25.0% within ttft 600 ms, e2e 700 ms" in text
    assert text.endswith("2 x HTTP 500: first")


def test_report_without_requests() -> None:
    report = make_report([], 0.0, percentiles=[50], slo={"ttft": 1}, peak=0, broken_off=0)
    json.dumps(report, allow_nan=False)
    assert report["ttft_ms"] is None
    assert "0 requests ok" in format_table(report)


def test_limits() -> None:
    assert is_good(outcome(), {"ttft": 500.001, "tpot": 100.001, "e2e": 1000.001})
    assert not is_good(outcome(), {"tpot": 99})
    assert is_good(outcome(tokens=1), {"tpot": 99}), "one token has no time between tokens"
    assert not is_good(outcome(failure=Failure("timeout", "")), {})


@pytest.mark.slow
@steady
@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=50))
def test_quantiles(values: list[float]) -> None:
    values.sort()
    wanted = statistics.quantiles(values, n=10, method="inclusive")
    assert [quantile(values, share / 10) for share in range(1, 10)] == pytest.approx(wanted)
    assert (quantile(values, 0), quantile(values, 1)) == (values[0], values[-1])
    assert summarize_ms([None], [50]) is None


@pytest.mark.parametrize("ending", ["svg", "png", "PDF"])
@pytest.mark.parametrize("outcomes", [[], [outcome(), outcome(2.0, failure=Failure("timeout", ""))]])
def test_plot(tmp_path: Path, ending: str, outcomes: list[LoadOutcome]) -> None:
    path = tmp_path / f"picture.{ending}"
    check_plot(path)
    plot(path, outcomes, {0: 3, 1: 2}, duration=2.5, slo={"ttft": 100.0}, title="m at http://a")
    assert path.stat().st_size > 5000


def test_wrong_plot_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must end with"):
        check_plot(tmp_path / "picture.bmp")


def test_plot_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match="--plot needs matplotlib: pip install matplotlib, or leave out --plot"):
        check_plot(tmp_path / "picture.svg")
