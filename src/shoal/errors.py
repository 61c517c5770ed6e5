"""One tree of errors. A message is one line: what happened, the numbers, the way out.

ShoalError
|-- UserError               what the caller can mend; the command line exits with 2
|   |-- ConfigError         an option, or options that do not go together
|   |   `-- AddressInUse    a port at which somebody listens already
|   |-- CheckpointError     a model folder, its configuration or its tensors
|   `-- RequestError        a prompt or a sampling parameter; also a ValueError
`-- EngineError             the engine could not go on; the command line exits with 1
    |-- RankFailed          a rank died, stood still or raised; names rank, process and step
    |-- ReplicasFailed      no replica is left; keeps what had finished
    |-- Unavailable           a request is not taken, or not ended, for now; `retry_after` says when to come again
    |   |-- QueueFull         ... because too many wait already
    |   `-- Overdue           ... because it waited too long, or its deadline has passed
    |-- CommError           an operation between ranks failed
    |   |-- CommTimeout     ... because somebody did not arrive in time
    |   `-- CommAborted     ... because somebody called it off
    `-- ClosedError         a call on an engine that was closed or had failed before
"""

from typing import Any


class ShoalError(Exception):
    exit_code = 1


class UserError(ShoalError):
    exit_code = 2


class ConfigError(UserError):
    pass


class AddressInUse(ConfigError):
    pass


class CheckpointError(UserError):
    pass


class RequestError(UserError, ValueError):
    pass


class EngineError(ShoalError):
    pass


class RankFailed(EngineError):
    pass


class ReplicasFailed(EngineError):
    """`outputs`: the RequestOutputs of a `generate` that had finished, by the number of their prompt."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.outputs: dict[int, Any] = {}


class Unavailable(EngineError):
    """`retry_after`: seconds."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class QueueFull(Unavailable):
    pass


class Overdue(Unavailable):
    pass


class CommError(EngineError):
    pass


class CommTimeout(CommError):
    pass


class CommAborted(CommError):
    pass


class ClosedError(EngineError):
    pass


def overflow(most: int) -> str:
    """How the error of a prompt that is too long begins: clients that shorten their conversations look for it."""
    return f"this model's maximum context length is {most} tokens"
