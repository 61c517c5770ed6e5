"""Log lines on stderr, under the logger `shoal`."""

import logging
import sys

from shoal import env

_FORMAT = "%(levelname)s %(asctime)s [%(name)s] %(message)s"


def get_logger(name: str) -> logging.Logger:
    """A child of the `shoal` logger; `name` is what the reader sees in brackets."""
    return logging.getLogger(f"shoal.{name}")


def configure_logging(prefix: str = "") -> None:
    """Sends the log to stderr. For programs of this project; a library call leaves logging to its caller."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(prefix + _FORMAT, "%H:%M:%S"))
    root = logging.getLogger("shoal")
    root.handlers[:] = [handler]
    root.setLevel(env.log_level())
    root.propagate = False
