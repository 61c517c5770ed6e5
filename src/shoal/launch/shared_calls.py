"""Calls on one engine that several processes make together, because all of them run the same program.

The process that leads has the engine. It makes each call, and sends the result to the others, which are its followers.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from shoal import errors
from shoal.errors import EngineError, ReplicasFailed, RequestError, ShoalError
from shoal.outputs import BeamSearchOutput, RequestOutput
from shoal.values import numbered
from shoal.wire.calls import CallAnswer, CallError

T = TypeVar("T")
_DIGITS = 16


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a method of `LLM`, as the other processes must make it too."""

    name: str
    arguments: Mapping[str, Any]  # the first is what the call is about

    def __str__(self) -> str:
        name, first = next(iter(self.arguments.items()), ("", None))
        if isinstance(first, Sized) and not isinstance(first, str | bytes | dict):
            return f"{self.name} with {numbered(len(first), name.removesuffix('s'))}"
        return self.name

    @property
    def digest(self) -> str:
        """A digest of the arguments, as far as they are plain data."""
        return hashlib.sha256(json.dumps(self.arguments, default=_plain, skipkeys=True).encode()).hexdigest()[:_DIGITS]


def _plain(value: Any) -> Any:
    """Return an argument in a form that is the same in all processes."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): each for key, each in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, tuple):
        return list(value)
    return type(value).__name__


class SharedCalls(Protocol):
    """The processes that make the same calls, seen from one of them."""

    def make(self, call: Call, run: Callable[[], T]) -> T:
        """Return the result of a call, which `run` computes in the process that leads.

        Raises:
            ShoalError: what the call raised there.
            ConfigError: this process makes another call than the one that leads.
        """

    def close(self) -> None:
        """Leave the other processes. Idempotent, never raises."""


class OwnCalls:
    """The calls of a process that no other follows."""

    def make(self, call: Call, run: Callable[[], T]) -> T:
        return run()

    def close(self) -> None:
        pass


def answer(number: int, call: Call, result: Any) -> CallAnswer:
    """Return the message with the result of a call."""
    if isinstance(result, list) and result and isinstance(result[0], BeamSearchOutput):
        return CallAnswer(number, str(call), call.digest, beams=tuple(result))
    outputs = tuple(map(_unlazy, result)) if isinstance(result, list) else None
    return CallAnswer(number, str(call), call.digest, outputs=outputs)


def result_of(found: CallAnswer) -> Any:
    """Return the result of a call, or raise its error.

    Raises:
        ShoalError: what the call has raised.
    """
    if found.error is not None:
        raise read_error(found.error)
    if found.beams is not None:
        return list(found.beams)
    return None if found.outputs is None else list(found.outputs)


def _unlazy(output: RequestOutput) -> RequestOutput:
    """Return the output with plain lists, which can be encoded."""
    completions = tuple(
        dataclasses.replace(each, logprobs=_listed(each.logprobs)) if each.logprobs is not None else each
        for each in output.outputs
    )
    prompt = None if output.prompt_logprobs is None else _listed(output.prompt_logprobs)
    return dataclasses.replace(output, outputs=completions, prompt_logprobs=prompt)


def _listed(items: Iterable[Mapping[int, Any] | None]) -> list[Any]:
    return [None if each is None else dict(each) for each in items]


def describe_error(error: BaseException) -> CallError:
    """Return an error as a message."""
    match error:
        case RequestError():
            return CallError("RequestError", error.message, error.param, error.code)
        case ReplicasFailed():
            return CallError(
                "ReplicasFailed", str(error), outputs={i: _unlazy(each) for i, each in error.outputs.items()}
            )
        case ShoalError():
            return CallError(type(error).__name__, str(error))
    return CallError("EngineError", f"rank 0 was interrupted by {type(error).__name__}")


def read_error(found: CallError) -> ShoalError:
    """Return the error of a message."""
    if found.kind == "RequestError":
        return RequestError(found.message, found.param, found.code)
    kind = getattr(errors, found.kind, EngineError)
    error: ShoalError = kind(found.message)
    if isinstance(error, ReplicasFailed):
        error.outputs = dict(found.outputs)
    return error
