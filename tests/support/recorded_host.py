"""Hosts as the kernel and the tools of vendors show them, from recorded texts."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from shoal.doctor.tools import RunTool, ToolOutput

Tree = Callable[[Mapping[str, str]], Path]


def write_tree(root: Path, files: Mapping[str, str]) -> Path:
    """Write files as the kernel would show them, and return their root."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def recorded(outputs: Mapping[str, str]) -> RunTool:
    """Return a function in place of `run_tool` that prints recorded outputs, by the beginning of the command."""

    def run(command: Sequence[str]) -> ToolOutput:
        line = " ".join(command)
        for beginning, text in outputs.items():
            if line.startswith(beginning):
                return ToolOutput(text)
        return ToolOutput(error=f"{command[0]} is not installed", missing=True)

    return run
