"""Commands of Shoal, and programs in Python, in forks of one process that has imported PyTorch."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

_PROGRAM = """
import json, os, sys
import torch
import shoal.cli.commands, shoal.cli.doctor, shoal.cli.generate, shoal.cli.main, shoal.llm.llm
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if not child:
        os.chdir(job["folder"])
        for number, path in enumerate([os.devnull, "stdout", "stderr"]):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
        if job["program"]:
            exec(compile(job["program"], "a program", "exec"), {"__name__": "__main__"})
            sys.exit()
        sys.argv = ["shoal", *job["arguments"]]
        shoal.cli.main.main()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Ended:
    code: int
    stdout: str
    stderr: str


class ForkedCommands:
    """Run commands one after the other. Each is spared the import of PyTorch, which takes 1.5 s."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._parent = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )

    def command(self, folder: Path, arguments: Sequence[str]) -> Ended:
        """Run `shoal` with these arguments. The command's outputs are left in the folder, as `stdout` and `stderr`."""
        return self._run(folder, arguments=list(arguments), program="")

    def program(self, folder: Path, text: str) -> Ended:
        return self._run(folder, arguments=[], program=text)

    def _run(self, folder: Path, **job: object) -> Ended:
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._parent.stdin.write(json.dumps({"folder": str(folder), **job}) + "\n")
        self._parent.stdin.flush()
        code = int(self._parent.stdout.readline())
        return Ended(code, (folder / "stdout").read_text("utf-8"), (folder / "stderr").read_text("utf-8"))

    def __enter__(self) -> "ForkedCommands":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._parent.communicate(timeout=60)
