"""A function that runs once on each node of a Ray cluster, at the same time on all."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from shoal.errors import ShoalError
from shoal.lazy import load

# Older versions of Ray hide all GPUs from a task that has asked for none.
_VARIABLES = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


class NodeTasks:
    """Calls of a function on nodes of a cluster. They take no resources, so busy nodes run them too."""

    def __init__(self, function: Callable[[Any], Any], arguments: Mapping[str, Any]) -> None:
        """Start the calls.

        Args:
            function: of a module that the nodes can import.
            arguments: the argument for each node, by the node's id.
        """
        pinned = load("ray.util.scheduling_strategies:NodeAffinitySchedulingStrategy")
        remote = load("ray:remote")(function)
        self._calls = {
            node: remote.options(
                num_cpus=0,
                max_retries=0,
                scheduling_strategy=pinned(node_id=node, soft=False),
                runtime_env={"env_vars": _VARIABLES},
            ).remote(argument)
            for node, argument in arguments.items()
        }

    def results(self, timeout_s: float) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the results of the calls, and why others have none, both by node. Calls that are late are ended."""
        found, failed = {}, {}
        deadline = time.monotonic() + timeout_s
        for node, call in self._calls.items():
            try:
                found[node] = load("ray:get")(call, timeout=max(deadline - time.monotonic(), 0.0))
            except Exception as error:  # noqa: BLE001 - Ray wraps what the function raised, and has errors of its own
                late = isinstance(error, TimeoutError)
                failed[node] = f"it did not end within {timeout_s:g} s" if late else _reason(error)
                if late:
                    with suppress(Exception):
                        load("ray:cancel")(call, force=True)
        return found, failed


def _reason(error: Exception) -> str:
    """Return one line. Ray's own text is a traceback, whose last line is the cause."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    if isinstance(cause, ShoalError) or len(lines) < 2:
        return lines[0] if lines else type(cause).__name__
    return lines[-1]
