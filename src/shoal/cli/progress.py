"""The progress of a job on stderr: a bar on a terminal, elsewhere a plain line every ten seconds."""

import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TextIO

from tqdm import tqdm

from shoal.outputs import RequestOutput

PERIOD_S = 10.0
_WITH_TOTAL = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} prompts{postfix} [{elapsed}, {remaining} left]"
_WITHOUT_TOTAL = "{n_fmt} prompts{postfix} [{elapsed}]"


class JobProgress:
    """The progress of one job. `total` is None if it is not known; `done` prompts were done before."""

    def __init__(
        self,
        total: int | None,
        *,
        done: int = 0,
        enabled: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total
        self._before = self._done = done
        self._tokens_in = self._tokens_out = 0
        self._stream = stream or sys.stderr
        self._clock = clock
        self._begun = self._said = clock()
        terminal = self._stream.isatty()
        self._plain = enabled and not terminal
        self._bar = tqdm(
            total=total,
            initial=done,
            file=self._stream,
            disable=not (enabled and terminal),
            dynamic_ncols=True,
            bar_format=_WITHOUT_TOTAL if total is None else _WITH_TOTAL,
        )

    def add(self, output: RequestOutput) -> None:
        self._done += 1
        self._tokens_in += len(output.prompt_token_ids)
        self._tokens_out += sum(len(each.token_ids) for each in output.outputs)
        self._bar.set_postfix_str(self._rates(), refresh=False)
        self._bar.update()
        if self._plain and self._clock() - self._said >= PERIOD_S:
            self._say()

    def tell(self, line: str) -> None:
        """Print a line above the bar."""
        if self._bar.disable:
            print(line, file=self._stream, flush=True)
        else:
            self._bar.write(line, file=self._stream)

    def close(self) -> None:
        self._bar.close()
        if self._plain and self._said > self._begun:
            self._say()

    def _rates(self) -> str:
        seconds = max(self._clock() - self._begun, 1e-3)
        return f"{self._tokens_in / seconds:,.0f} tokens/s in, {self._tokens_out / seconds:,.0f} out"

    def _say(self) -> None:
        self._said = self._clock()
        of = "" if self._total is None else f"/{self._total}"
        print(f"{self._done}{of} prompts, {self._rates()}{self._left()}", file=self._stream, flush=True)

    def _left(self) -> str:
        fresh = self._done - self._before
        if self._total is None or not fresh or self._done >= self._total:
            return ""
        seconds = (self._total - self._done) * (self._clock() - self._begun) / fresh
        return f", {timedelta(seconds=round(seconds))} left"
