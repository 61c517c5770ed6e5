"""One tree of errors. A message is one line: what happened, the numbers, the way out.

ShoalError
|-- UserError               what the user can correct; the command line exits with 2
|   |-- ConfigError         an option, or options that do not go together
|   |   `-- AddressInUse    a port at which another process listens
|   |-- CheckpointError     a model folder, its configuration or its tensors
|   `-- RequestError        a prompt or a parameter of a request; also a ValueError
`-- EngineError             the engine could not continue; the command line exits with 1
    |-- RankFailed          a rank died, hung or reported an error; names rank, process and step
    |   `-- RanksDied       ... whose process has ended or stands still, and which can be replaced
    |-- ReplicasFailed      no replica is left; has the outputs that had finished
    |-- Unavailable           a request is not accepted or finished now; `retry_after` says when to try again
    |   |-- QueueFull         ... because too many requests wait
    |   `-- Overdue           ... because it waited too long, or its deadline has passed
    |-- CommError           an operation between ranks failed
    |   |-- CommTimeout     ... because a rank did not arrive in time
    |   `-- CommAborted     ... because it was aborted
    `-- ClosedError         a call on an engine that was closed or had failed before
"""

from collections.abc import Sequence
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
    """A request that is refused because its sender made a mistake.

    Args:
        message: one line: what is wrong, and the way out.
        param: the parameter or field that is at fault, by our name for it: "top_k", "prompt", "messages[2].role".
            None if none of them is.
        code: the kind of mistake, for programs: `CONTEXT_LENGTH_EXCEEDED`, `UNPROCESSABLE`, or None for any other.
        subject: the words for the parameter that the message begins with. `renamed` replaces them.
    """

    def __init__(
        self, message: str, param: str | None = None, code: str | None = None, *, subject: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.subject = subject or ""

    @classmethod
    def about(cls, param: str, problem: str, code: str | None = None, *, subject: str | None = None) -> "RequestError":
        """Return an error whose message is the name of the parameter and what is wrong with its value.

        Args:
            problem: follows the name; after a space, unless it begins with a colon.
            subject: the name in the message, if it says more than `param`, such as "structured_outputs.json".
        """
        name = subject or param
        return cls(f"{name}{'' if problem.startswith(':') else ' '}{problem}", param, code, subject=name)

    def renamed(self, name: str) -> "RequestError":
        """Return the same error for a sender who calls the parameter `name`."""
        message = name + self.message[len(self.subject) :] if self.subject else self.message
        return RequestError(message, name, self.code, subject=name if self.subject else None)

    def within(self, where: str) -> "RequestError":
        """Return the same error with a message that begins with the place of the mistake, such as "prompt 3"."""
        return RequestError(f"{where}: {self.message}", self.param, self.code)


class EngineError(ShoalError):
    """The engine could not continue.

    Args:
        reason: the message without the name of the replica that it begins with; None: it begins with no name.
    """

    def __init__(self, message: str = "", reason: str | None = None) -> None:
        super().__init__(message)
        self.reason = message if reason is None else reason


class RankFailed(EngineError):
    pass


class RanksDied(RankFailed):
    """The processes of some ranks have ended or stand still. The other ranks can go on with new processes for them.

    Args:
        ranks: the numbers of the ranks that died; none if all of them belong to other replicas, which share experts.
    """

    def __init__(self, message: str, ranks: Sequence[int]) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


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


CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"  # the prompt is too long; OpenAI's API has the same code
UNPROCESSABLE = "unprocessable"  # a structured output that is well-formed, but that this engine can't obey


def context_length_exceeded(most: int, what_it_has: str) -> RequestError:
    """Return the error of a prompt that is too long.

    Its message begins like that of OpenAI's API, which clients that shorten their conversations look for.

    Args:
        most: the most tokens that a prompt and its output may have together.
        what_it_has: what the prompt has instead, and the way out.
    """
    return RequestError(
        f"this model's maximum context length is {most} tokens; {what_it_has}", "prompt", CONTEXT_LENGTH_EXCEEDED
    )


def structured_outputs_error(problem: str, kind: str = "") -> RequestError:
    """Return the error of a structured output that can't be obeyed.

    Args:
        kind: the field of `structured_outputs` that is at fault, such as "json".
    """
    subject = f"structured_outputs.{kind}" if kind else "structured_outputs"
    return RequestError.about("structured_outputs", problem, UNPROCESSABLE, subject=subject)
