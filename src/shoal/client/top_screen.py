"""The tables of `shoal top`."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from shoal.client.status_history import ALIVE, Status, StatusHistory

_COLOURS = {
    "ready": "green",
    "starting": "blue",
    "restarting": "yellow",
    "awaited": "bright_black",
    "leaving": "magenta",
    "failed": "red",
}
_BAR_WIDTH = 10  # characters
_OTHER_LINES = 10  # lines that belong neither to a replica nor to a rank
_MAX_FAILURES = 3
_FULL_WIDTH = 110  # characters that a line needs for all columns
_WIDE_COLUMNS = {"host", "for", "held", "weights"}  # shown only if lines have the full width
_LEFT_ALIGNED = {"replica", "host", "state", "KV cache", "busy"}


def screen(history: StatusHistory, *, width: int, lines: int | None = None, trouble: str = "") -> RenderableType:
    """Return the tables of the last status.

    Args:
        width: characters in a line; on narrow screens the least important columns are left out.
        lines: lines on the screen; None: any number. Replicas and ranks that do not fit are counted.
        trouble: why there is no newer status.
    """
    status = history.latest
    replicas: Sequence[Mapping[str, Any]] = status["replicas"]
    room = max(4, lines - _OTHER_LINES) if lines is not None else None
    shown = replicas if room is None else replicas[: max(2, room // 2)]
    ranks = [(each, rank) for each in replicas if each["state"] in ALIVE for rank in _ranks(each)]
    shown_ranks = ranks if room is None else ranks[: max(2, room - len(shown))]
    parts: list[RenderableType] = [_head(history, status), _totals(history, status), Text()]
    if trouble:
        parts.insert(0, Text(trouble, style="bold white on red"))
    parts.append(_replica_table(history, shown, width))
    parts += _more(len(replicas) - len(shown), "replicas")
    parts += _failures(replicas)
    if shown_ranks:
        parts += [Text(), _rank_table(history, shown_ranks, width), *_more(len(ranks) - len(shown_ranks), "ranks")]
    return Group(*parts)


def _head(history: StatusHistory, status: Status) -> Text:
    ready = sum(each["state"] == "ready" for each in status["replicas"])
    if status["failure"]:
        state, colour = f"failed: {status['failure']}", "red"
    elif not status["accepting"]:
        state, colour = "draining", "magenta"
    else:
        state, colour = ("serving", "green") if ready else ("no replica is ready", "yellow")
    return Text.assemble(
        (str(status["model"]), "bold"),
        "  ",
        (state, f"bold {colour}"),
        f"  {ready} of {_plural(len(status['replicas']), 'replica')} ready, tp {status['tp']}, pp {status['pp']}, "
        f"up for {_duration(status['uptime_s'])}, version {status.get('version', '?')}",
    )


def _totals(history: StatusHistory, status: Status) -> Text:
    stats = [each["stats"] for each in status["replicas"] if each["stats"]]
    running, waiting = (sum(_live(each, name) for each in status["replicas"]) for name in ("running", "waiting"))
    rates = history.rates()
    hits = _share(sum(each["prefix_hits"] for each in stats), sum(each["prefix_queries"] for each in stats))
    restarts = sum(each["restarts"] for each in status["replicas"])
    return Text(
        f"{running:,} running, {waiting:,} waiting, {status['queued']:,} queued  "
        f"{_rate(rates.generated if rates else None)} tokens/s out, {_rate(rates.prompt if rates else None)} in  "
        f"prefix hits {_percent(hits)}  {_plural(restarts, 'restart')}, {_plural(status['replays'], 'replay')}"
    )


def _replica_table(history: StatusHistory, replicas: Sequence[Mapping[str, Any]], width: int) -> Table:
    rows = []
    for each in replicas:
        stats = each["stats"] or {}
        blocks = stats.get("num_blocks", 0)
        rates = history.rates_of(each["number"])
        rows.append(
            {
                "replica": str(each["number"]),
                "host": each["host"],
                "state": Text(each["state"], style=_COLOURS.get(each["state"], "")),
                "for": _duration(each["since_s"]),
                "run": f"{_live(each, 'running'):,}",
                "wait": f"{_live(each, 'waiting'):,}",
                "held": f"{each['held']:,}",
                "KV cache": _bar(
                    _share(blocks - _live(each, "free_blocks"), blocks) if each["state"] in ALIVE else None
                ),
                "hits": _percent(_share(stats.get("prefix_hits", 0), stats.get("prefix_queries", 0))),
                "out/s": _rate(rates.generated if rates else None),
                "in/s": _rate(rates.prompt if rates else None),
                "restarts": str(each["restarts"]),
            }
        )
    return _table(rows, width)


def _rank_table(
    history: StatusHistory, ranks: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], width: int
) -> Table:
    rows = [
        {
            "replica": str(replica["number"]),
            "rank": str(rank["rank"]),
            "stage": str(rank["stage"]),
            "pid": str(rank["pid"]),
            "host": rank.get("host", replica["host"]),
            "busy": _bar(history.busy_share(replica["number"], rank["rank"])),
            "memory": _bytes(rank["anonymous"]),
            "KV written": _bytes(rank["kv_bytes"]),
            "weights": _bytes(rank["weight_bytes"]),
        }
        for replica, rank in ranks
    ]
    return _table(rows, width)


def _failures(replicas: Sequence[Mapping[str, Any]]) -> list[RenderableType]:
    """Return the last failures, those of replicas that are down first."""
    ended = sorted(
        (each for each in replicas if each["cause"]), key=lambda each: (each["state"] == "ready", each["since_s"])
    )
    return [
        Text(f"replica {each['number']} ended: {each['cause']}", style="" if each["state"] == "ready" else "red")
        for each in ended[:_MAX_FAILURES]
    ]


def _table(rows: Sequence[Mapping[str, str | Text]], width: int) -> Table:
    narrow = width < _FULL_WIDTH
    names = [name for name in rows[0] if not (narrow and name in _WIDE_COLUMNS)] if rows else []
    table = Table(box=None, padding=(0, 1 if narrow else 2, 0, 0), header_style="bold", pad_edge=False)
    for name in names:
        table.add_column(name, justify="left" if name in _LEFT_ALIGNED else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(row[name] for name in names))
    return table


def _ranks(replica: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return replica["stats"]["ranks"] if replica["stats"] else ()


def _live(replica: Mapping[str, Any], name: str) -> int:
    """Return a gauge of the engine; 0 for a replica that has ended, whose last value is out of date."""
    return int(replica["stats"][name]) if replica["stats"] and replica["state"] in ALIVE else 0


def _more(count: int, what: str) -> list[RenderableType]:
    return [Text(f"and {count:,} more {what}", style="dim")] if count > 0 else []


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.{1 if 0 < share < 0.0995 else 0}f} %"


def _bar(share: float | None) -> Text:
    filled = round(_BAR_WIDTH * (share or 0.0))
    return Text.assemble(("█" * filled, "cyan"), ("░" * (_BAR_WIDTH - filled), "dim"), f" {_percent(share):>5}")


def _rate(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:,.0f}"


def _plural(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _duration(seconds: float) -> str:
    for unit, size, limit in (("s", 1, 100), ("min", 60, 6000), ("h", 3600, 172800)):
        if seconds < limit:
            return f"{int(seconds / size)} {unit}"
    return f"{int(seconds / 86400)} d"


def _bytes(count: float) -> str:
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    unit = 0
    while count >= 1000 and unit < len(units) - 1:
        count, unit = count / 1024, unit + 1
    return f"{count:.1f} {units[unit]}" if unit and count < 10 else f"{count:.0f} {units[unit]}"
