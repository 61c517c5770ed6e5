"""Parts of an examination that run at the same time, each on a thread of its own and with a deadline."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one part. `error`: the reason why it has none."""

    value: Any = None
    error: str = ""


def run_all(parts: Mapping[str, Callable[[], Any]], timeout_s: float) -> dict[str, Outcome]:
    """Run all parts at the same time, and return what each has returned, or why it has not.

    A part that hangs (in a file system or a driver that does not answer) is left behind: its thread ends with the
    process.
    """
    found: dict[str, Outcome] = {}

    def run(name: str, part: Callable[[], Any]) -> None:
        try:
            outcome = Outcome(part())
        except Exception as error:  # noqa: BLE001 - whatever it is, the other parts must go on
            outcome = Outcome(error=_described(error))
        found.setdefault(name, outcome)

    threads = {
        name: threading.Thread(target=run, args=(name, part), daemon=True, name=f"doctor-{name}")
        for name, part in parts.items()
    }
    for thread in threads.values():
        thread.start()
    deadline = time.monotonic() + timeout_s
    for name, thread in threads.items():
        thread.join(max(0.0, deadline - time.monotonic()))
        found.setdefault(name, Outcome(error=f"it did not end within {timeout_s:g} s"))
    return {name: found[name] for name in parts}


def _described(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
