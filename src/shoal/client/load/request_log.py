"""The log of requests. Each line is a JSON object, and a later run can replay the log.

Times are in seconds; `arrival_s`, `sent_s`, `first_token_s` and `ended_s` count from the start of the run. A replay
needs `arrival_s`, `max_tokens` or `output_tokens`, and `prompt` (text or token ids) or `prompt_tokens`. Logs of other
programs can be converted to this form.
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from shoal.client.load.outcome import LoadOutcome
from shoal.client.load.prompts import Prompt
from shoal.errors import UserError


@dataclass(frozen=True, slots=True)
class LoggedRequest:
    """A request of a log. `prompt` is None if only its length is known."""

    arrival: float
    prompt: Prompt | None
    prompt_tokens: int
    max_tokens: int
    index: int = 0  # the order of requests that arrive at the same time


def log_line(outcome: LoadOutcome) -> str:
    planned = outcome.request
    record: dict[str, Any] = {
        "index": planned.index,
        "arrival_s": outcome.arrival,
        "sent_s": outcome.sent,
        "first_token_s": outcome.first,
        "ended_s": outcome.ended,
        "prompt_tokens": outcome.prompt_tokens or planned.prompt_tokens,
        "max_tokens": planned.max_tokens,
        "output_tokens": outcome.output_tokens,
        "ttft_s": outcome.ttft,
        "tpot_s": outcome.tpot,
        "e2e_s": outcome.e2e,
        "finish_reason": outcome.finish_reason,
        "error": None if outcome.failure is None else f"{outcome.failure.kind}: {outcome.failure.message}",
        "prompt": planned.prompt,
    }
    return json.dumps(record, ensure_ascii=False) + "\n"


@contextmanager
def writing_log(path: Path) -> Iterator[TextIO]:
    """Open a log for writing.

    Raises:
        UserError: the file can't be opened or written.
    """
    try:
        with path.open("w", encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise UserError(f"--request-log-out {path} can't be written: {error.strerror}") from None


def read_log(path: Path) -> list[LoggedRequest]:
    """Read the requests of a log. They are sorted by arrival, since lines are written as requests end.

    Times of arrival count from the first request.

    Raises:
        UserError: the file can't be read, is empty, or has a line that is not a request.
    """
    try:
        with path.open(encoding="utf-8") as file:
            entries = list(_entries(file, path))
    except OSError as error:
        raise UserError(f"--request-log-in {path} can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"--request-log-in {path} is not a text in UTF-8") from None
    if not entries:
        raise UserError(f"--request-log-in {path} has no requests")
    start = min(entry.arrival for entry in entries)
    moved = [dataclasses.replace(each, arrival=each.arrival - start) for each in entries]
    return sorted(moved, key=lambda entry: (entry.arrival, entry.index))


def _entries(lines: Iterator[str], path: Path) -> Iterator[LoggedRequest]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield _entry(json.loads(line), number)
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise UserError(f"--request-log-in {path}, line {number}: {what}") from None


def _entry(record: dict[str, Any], number: int) -> LoggedRequest:
    prompt = record.get("prompt")
    if prompt is None:
        length = _count(record, "prompt_tokens")
    elif isinstance(prompt, str):
        length = int(record.get("prompt_tokens") or 0)
    elif isinstance(prompt, list) and prompt and all(type(each) is int and each >= 0 for each in prompt):
        length = len(prompt)
    else:
        raise ValueError("prompt is neither text nor token ids")
    arrival = float(record["arrival_s"])
    if not math.isfinite(arrival):
        raise ValueError(f"arrival_s is {arrival}")
    name = "max_tokens" if record.get("max_tokens") is not None else "output_tokens"
    index = record.get("index")
    return LoggedRequest(arrival, prompt, length, _count(record, name), index if type(index) is int else number)


def _count(record: dict[str, Any], name: str) -> int:
    value = record[name]
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be an integer of at least 1")
    return value
