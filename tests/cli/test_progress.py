"""The progress of a job, on terminals and elsewhere."""

import io

from shoal.cli.progress import PERIOD_S, JobProgress
from shoal.outputs import CompletionOutput, RequestOutput

OUTPUT = RequestOutput("", "a", (1, 2, 3, 4), (CompletionOutput(0, "b", (1, 2), "stop"),) * 3)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_are_printed_from_time_to_time() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = JobProgress(100, done=40, stream=stream, clock=clock)
    for _ in range(10):
        clock.now += PERIOD_S / 5
        progress.add(OUTPUT)
    assert stream.getvalue().splitlines() == [
        "45/100 prompts, 2 tokens/s in, 3 out, 0:01:50 left",  # 5 in 10 s, so 55 in 110 s
        "50/100 prompts, 2 tokens/s in, 3 out, 0:01:40 left",
    ]
    clock.now += 1
    progress.add(OUTPUT)
    progress.close()
    assert stream.getvalue().splitlines()[2:] == [
        "51/100 prompts, 2 tokens/s in, 3 out, 0:01:34 left"
    ]  # 49 at 11 in 21 s


def test_short_jobs_are_silent() -> None:
    stream = io.StringIO()
    progress = JobProgress(1, stream=stream, clock=Clock())
    progress.add(OUTPUT)
    progress.tell("error: something")
    progress.close()
    assert stream.getvalue() == "error: something\n"


def test_without_a_total() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = JobProgress(None, stream=stream, clock=clock)
    clock.now += PERIOD_S
    progress.add(OUTPUT)
    assert stream.getvalue() == "1 prompts, 0 tokens/s in, 1 out\n"


def test_a_bar_on_a_terminal() -> None:
    clock, stream = Clock(), Terminal()
    progress = JobProgress(4, done=1, stream=stream, clock=clock)
    clock.now += 1
    progress.add(OUTPUT)
    progress.tell("error: prompt 2: bad")
    progress.add(OUTPUT)
    progress.close()
    shown = stream.getvalue()
    assert "error: prompt 2: bad\n" in shown
    assert "3/4 prompts, 8 tokens/s in, 12 out" in shown.split("\r")[-1]
    assert "left]" in shown


def test_a_bar_without_a_total() -> None:
    stream = Terminal()
    progress = JobProgress(None, stream=stream, clock=Clock())
    progress.add(OUTPUT)
    progress.close()
    assert "1 prompts, 4,000 tokens/s in" in stream.getvalue()


def test_switched_off() -> None:
    clock, stream = Clock(), Terminal()
    progress = JobProgress(4, enabled=False, stream=stream, clock=clock)
    clock.now += 2 * PERIOD_S
    progress.add(OUTPUT)
    progress.close()
    assert stream.getvalue() == ""
