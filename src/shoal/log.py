"""The log: all loggers are children of `shoal`, and Shoal's own programs write it to stderr."""

import logging
import sys

from shoal import env

_FORMAT = "%(levelname)s %(asctime)s [%(name)s] %(message)s"


def get_logger(name: str) -> logging.Logger:
    """Return a child of the `shoal` logger. `name` appears in brackets in each line."""
    return logging.getLogger(f"shoal.{name}")


def configure_logging(prefix: str = "") -> None:
    """Write the log to stderr. Only for this project's own programs: users of the library configure logging."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(prefix + _FORMAT, "%H:%M:%S"))
    root = logging.getLogger("shoal")
    root.handlers[:] = [handler]
    root.setLevel(env.log_level())
    root.propagate = False
