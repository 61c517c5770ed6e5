"""A fake host with GPUs."""

from pathlib import Path

import pytest


def pose_as_host_with(listing: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace `nvidia-smi` by a program that prints `listing`: lines of index, UUID and MiB."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{listing.rstrip()}\nEND\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
