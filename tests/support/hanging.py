"""Ranks that hang in a step."""

from pathlib import Path

# Processes with this environment hang in their next step after SIGUSR1: they compute for ever.
HANGS_ON_SIGNAL = {"PYTHONPATH": str(Path(__file__).parent / "hang_on_signal")}
