"""The limits of a fleet: waiting requests, times and restarts."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FleetLimits:
    """The limits of a fleet. All times are in seconds."""

    max_queued: int  # requests that may wait for a replica
    max_wait: float | None  # how long a request may wait for its first replica; None: without a limit
    timeout: float | None  # how long a request may take in all; None: without a limit
    max_restarts: int  # restarts of one replica within an hour
    start_timeout: float  # how long a replica may take to become ready
    answer_timeout: float = float("inf")  # how long a replica with requests may be silent before it is given up
    max_model_len: int = 0  # the context length that replicas were planned for; what they hold may be less
