"""Entries in, lines out: a window of prompts is prepared, run and written, whatever their number."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from shoal.errors import RequestError
from shoal.jobs.entries import JobEntry, digest, draws_by_job
from shoal.jobs.parameters import Parameters
from shoal.outputs import RequestOutput
from shoal.params import Message, Prompt, SamplingParams
from shoal.text.prompts import Job, RefusedPrompt, salted


class Preparer(Protocol):
    """What checks prompts and cuts them into tokens: a `PromptReader`, or an `LLM`."""

    def prepare(self, index: int, prompt: Prompt, params: SamplingParams) -> Job: ...

    def prepare_chat(self, index: int, messages: Sequence[Message], params: SamplingParams, **template: Any) -> Job: ...


class JobRunner(Preparer, Protocol):
    """As an `LLM`: it pulls jobs through a bounded window."""

    def run(
        self, jobs: Iterable[Job | RefusedPrompt], *, ordered: bool = False
    ) -> Iterator[tuple[int, RequestOutput]]: ...


def prepare(preparer: Preparer, entry: JobEntry, params: SamplingParams) -> Job:
    """
    Raises:
        RequestError: the entry can't be used.
    """
    if entry.error is not None:
        raise RequestError(entry.error)
    if entry.messages is not None:
        return preparer.prepare_chat(entry.index, entry.messages, params, cache_salt=entry.cache_salt)
    if entry.prompt is None:
        raise RequestError("it has no prompt")
    return preparer.prepare(entry.index, salted(entry.prompt, entry.cache_salt), params)


class JobRun:
    """`seed` draws for those that bring no seed: by their index, so that a resumed job draws what it would have."""

    def __init__(self, engine: JobRunner, parameters: Parameters, *, seed: int) -> None:
        self._engine = engine
        self._parameters = parameters
        self._seed = seed
        self._pending: dict[int, tuple[JobEntry, str]] = {}  # what the engine has

    @property
    def unfinished(self) -> int:
        """Entries that the engine has and has not finished; never more than its window."""
        return len(self._pending)

    def __call__(
        self,
        entries: Iterable[JobEntry],
        *,
        ordered: bool = False,
        skip: Callable[[JobEntry], bool] = lambda _: False,
        finish: Callable[[], None] = lambda: None,
    ) -> Iterator[tuple[JobEntry, str, RequestOutput]]:
        """(entry, digest, output) as they finish, or in the entries' order. What can't be used fails alone.

        `skip` says which to leave out; `finish` is called when all entries were read.
        """
        for index, output in self._engine.run(self._jobs(entries, skip, finish), ordered=ordered):
            entry, found = self._pending.pop(index)
            yield entry, found, output

    def _jobs(
        self, entries: Iterable[JobEntry], skip: Callable[[JobEntry], bool], finish: Callable[[], None]
    ) -> Iterator[Job | RefusedPrompt]:
        for entry in entries:
            if not skip(entry):
                job, found = self._job(entry)
                self._pending[entry.index] = (entry, found)
                yield job
        finish()

    def _job(self, entry: JobEntry) -> tuple[Job | RefusedPrompt, str]:
        try:
            params = self._parameters.of(entry)
            return prepare(self._engine, entry, self._seeded(entry.index, params)), digest(entry, params, self._seed)
        except RequestError as error:
            return RefusedPrompt(entry.index, entry.text, (), str(error)), ""

    def _seeded(self, index: int, params: SamplingParams) -> SamplingParams:
        if not draws_by_job(params):
            return params
        drawn = hashlib.blake2b(f"{self._seed}:{index}".encode(), digest_size=8).digest()
        return dataclasses.replace(params, seed=int.from_bytes(drawn, "little"))
