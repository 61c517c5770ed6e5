"""The program `shoal`. Modules that take time to import are loaded once Ctrl-C is handled."""

import os
import signal
import sys

from shoal.cli.container_init import stand_apart
from shoal.lazy import load
from shoal.process import garbage_collector, import_path, open_files


def main() -> None:
    """Run the command, and exit with its code."""
    try:
        signal.signal(signal.SIGTERM, _interrupt)
        import_path.remove_implicit_folders()
        _open_standard_streams()
        garbage_collector.collect_rarely()
        garbage_collector.end_without_collections()
        stand_apart()
        signal.signal(
            signal.SIGCHLD, signal.SIG_DFL
        )  # the parent may have it ignored; then no child could be waited for
        code = load("shoal.cli.commands:run")()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # at once, since Ctrl-C may be pressed several times
        print("interrupted", file=sys.stderr)
        code = 130
    if code == 130:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


def _open_standard_streams() -> None:
    """Open what stands for the standard streams that were closed: for None, `print` would write errors to stdout."""
    open_files.fill_standard_descriptors()
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt
