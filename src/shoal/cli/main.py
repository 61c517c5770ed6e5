"""`shoal`, the program. What takes time to import comes in only where Ctrl-C is listened to."""

import signal
import sys

from shoal import import_path
from shoal.lazy import load


def main() -> None:
    """Exits with the code of `commands.run`."""
    import_path.forget_implicit_folders()
    try:
        signal.signal(signal.SIGTERM, _interrupt)
        code = load("shoal.cli.commands:run")()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # at once: whoever presses Ctrl-C may do so several times
        print("interrupted", file=sys.stderr)
        code = 130
    if code == 130:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
