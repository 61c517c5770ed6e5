"""Run a big job, kill it half-way and resume it: `python benchmarks/big_job.py --prompts 10000 --output big_job.json`.

It runs `shoal generate` on generated prompts, kills it with SIGKILL when half of the lines are written, and resumes it.
It reports the number of lines at the end, the seconds, and the memory of the process that reads and writes. Anonymous
memory is measured when a tenth, and when nine tenths, of a run's lines are written, to show whether it grows.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

_POLL_S = 0.1


@dataclass
class Run:
    """A process that is watched until it ends. It is killed when it has written `kill_at` lines, if this is given."""

    command: list[str]
    output: Path
    total: int
    kill_at: int | None = None

    def watch(self) -> dict[str, Any]:
        before = _lines(self.output)
        span = (self.kill_at or self.total) - before
        early = late = peak = 0
        begun = time.monotonic()
        with subprocess.Popen(self.command) as process:
            while process.poll() is None:
                done, used = _lines(self.output) - before, _anonymous(process.pid)
                peak = max(peak, used)
                if done >= span // 10 and not early:
                    early = used
                if done <= span * 9 // 10 and used:
                    late = used
                if self.kill_at is not None and before + done >= self.kill_at:
                    process.kill()
                time.sleep(_POLL_S)
        return {
            "lines_written": _lines(self.output) - before,
            "exit_code": process.returncode,
            "seconds": round(time.monotonic() - begun, 1),
            "anonymous_bytes_at_10_percent": early,
            "anonymous_bytes_at_90_percent": late,
            "anonymous_bytes_peak": peak,
        }


def _lines(path: Path) -> int:
    """Count the complete lines of a file. It reads in blocks, to take little time from the measured process."""
    count = 0
    if path.exists():
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                count += block.count(b"\n")
    return count


def _anonymous(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    for line in status.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def _check(output: Path, total: int) -> bool:
    """Return whether the file has one answer to each prompt, without an error."""
    seen = bytearray(total)
    with output.open("rb") as file:
        for text in file:
            line = json.loads(text)
            seen[line["index"]] += line.get("error") is None and line["prompt"] == _prompt(line["index"])
    return seen == bytearray(b"\1") * total


def _prompt(index: int) -> str:
    return f"{index % 90 + 10} + {index // 90 % 90 + 10} ="


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--prompts", default=10_000, show_default=True, help="how many")
@click.option("--output", type=click.Path(path_type=Path), help="write JSON to this file")
@click.option(
    "--tensor-parallel-size", "ranks", default=2, show_default=True, help="the parent is free of torch if > 1"
)
@click.argument("flags", nargs=-1)
def main(prompts: int, output: Path | None, ranks: int, flags: tuple[str, ...]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, answers = Path(folder) / "prompts.jsonl", Path(folder) / "answers.jsonl"
        with source.open("w") as file:
            for index in range(prompts):
                print(json.dumps({"prompt": _prompt(index)}), file=file)
        command = [sys.executable, "-m", "shoal", "generate", "--prompts-file", str(source)]
        command += ["--output", str(answers), "--tensor-parallel-size", str(ranks), "--max-tokens", "8", *flags]
        killed = Run(command, answers, prompts, kill_at=prompts // 2).watch()
        resumed = Run([*command, "--resume"], answers, prompts).watch()
        report = {
            "benchmark": "big_job",
            "prompts": prompts,
            "cores": os.cpu_count(),
            "killed": killed,
            "resumed": resumed,
            "lines": _lines(answers),
            "each_prompt_once": _check(answers, prompts),
        }
    text = json.dumps(report, indent=2)
    print(text)
    if output is not None:
        output.write_text(text + "\n")


if __name__ == "__main__":
    main()
