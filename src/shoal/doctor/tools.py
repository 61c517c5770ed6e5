"""Tools of the operating system and of vendors, run with a deadline."""

import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class ToolOutput:
    """The output of a tool. `error`: the reason why it could not be run or failed; `missing`: it is not installed."""

    text: str = ""
    error: str = ""
    missing: bool = False


RunTool = Callable[[Sequence[str]], ToolOutput]


def run_tool(command: Sequence[str]) -> ToolOutput:
    """Run a tool, and return its output."""
    if shutil.which(command[0]) is None:
        return ToolOutput(error=f"{command[0]} is not installed", missing=True)
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return ToolOutput(error=f"{command[0]} did not end within {_TIMEOUT_S:g} s")
    except OSError as error:
        return ToolOutput(error=f"{command[0]} cannot be run: {error.strerror}")
    if done.returncode:
        words = " ".join((done.stderr.strip() or done.stdout.strip()).split())
        return ToolOutput(text=done.stdout, error=f"{command[0]}: {words[:300] or f'exit code {done.returncode}'}")
    return ToolOutput(text=done.stdout)
