"""What a fleet of replicas bounds: times, requests that wait, starts."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FleetLimits:
    """`max_queued` requests may wait for a replica, each for `max_wait` seconds; a request may take `timeout` seconds
    in all. A replica may be started again `max_restarts` times within an hour, and has `start_timeout` for it; one that
    has requests and says nothing for `answer_timeout` is lost. Replicas were planned for `max_model_len` tokens of a
    prompt and its output; what they hold may be less."""

    max_queued: int
    max_wait: float | None
    timeout: float | None
    max_restarts: int
    start_timeout: float
    answer_timeout: float = float("inf")
    max_model_len: int = 0
